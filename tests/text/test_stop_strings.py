"""The stop matcher against a naive search over the whole text."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from trident_llm.text import StopAutomaton, StopMatcher

TEXT = st.text("ab ", max_size=30)
STOPS = st.lists(st.text("ab ", min_size=1, max_size=5), min_size=0, max_size=16)


def first_stop(text: str, stops: list[str], active_from: int = 0) -> int | None:
    """Where the text must end: the start of the stop string that is completed first, at or after ``active_from``
    characters; of several completed together, of the longest."""
    found = []
    for stop in stops:
        start = text.find(stop, max(active_from - len(stop) + 1, 0))
        if start >= 0:
            found.append((start + len(stop), start))
    return min(found)[1] if found else None


def split(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 100), max_size=8))
def test_equals_a_search_over_the_whole_text(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(StopAutomaton(stops))
    shown = ""
    seen = ""
    for piece in split(text, cuts):
        if matcher.stopped:
            break
        seen += piece
        shown += matcher.push(piece)
        if not matcher.stopped:
            held = max((n for s in stops for n in range(1, len(s)) if seen.endswith(s[:n])), default=0)
            assert shown == seen[: len(seen) - held], "held back: the longest suffix that begins a stop string"
    end = first_stop(text, stops)
    assert matcher.stopped == (end is not None)
    assert shown + matcher.finish() == text[:end]


@given(inactive=TEXT, active=TEXT, stops=STOPS)
def test_only_stops_completed_while_active_count(inactive: str, active: str, stops: list[str]) -> None:
    matcher = StopMatcher(StopAutomaton(stops))
    shown = matcher.push(inactive, active=False)
    shown += matcher.push(active)
    shown += matcher.finish()
    assert shown == (inactive + active)[: first_stop(inactive + active, stops, active_from=len(inactive))]


def test_first_completed_wins_and_then_the_longest() -> None:
    matcher = StopMatcher(StopAutomaton(["abc d", "c", "bc"]))
    assert matcher.push("xabc d") == "xa"
    assert matcher.stopped
    assert matcher.push("more") == ""
    assert matcher.finish() == ""


def test_text_passes_untouched_without_stop_strings() -> None:
    matcher = StopMatcher(StopAutomaton([]))
    assert matcher.push("anything") == "anything"
    assert not matcher.stopped
