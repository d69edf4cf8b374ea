"""Deltas that come twice, are lost, or go on in another engine process."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests.text.generations import EOS, delta, running
from trident_llm.protocol import Abort, SampleStart
from trident_llm.text import Tokenizer


def test_duplicates_are_dropped(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer)
    generation.apply(delta("abcd"))
    generation.apply(delta("ab"))
    generation.apply(delta("cdef", offset=2))
    generation.apply(delta("ef", offset=4, finish_reason="length"))
    assert generation.full_output(0).text == "abcdef"
    assert generation.full_output(0).finish_reason == "length"


def test_gap_asks_for_resubmission(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, n=2)
    generation.apply(delta("abc"))
    generation.apply(delta("done", sample_index=1, finish_reason="length"))
    assert generation.apply(delta("f", offset=5)) == [Abort(request_id="r")]
    assert generation.needs_resubmit
    assert generation.apply(delta("g", offset=6)) == []
    submit = generation.submit()
    assert not generation.needs_resubmit
    assert submit.request_id == generation.request_id != "r"
    assert submit.samples == [SampleStart(index=0, output_ids=list(b"abc"))]
    assert generation.apply(delta("d", offset=3)) == [], "a delta of the submission before is stale"
    generation.apply(delta("def", offset=3, finish_reason="length", request_id=submit.request_id))
    assert generation.full_output(0).text == "abcdef"
    assert generation.finished


def test_resubmission_keeps_stop_strings_and_characters_whole(byte_tokenizer: Tokenizer) -> None:
    """What was held back when the engine died goes on where it was."""
    generation = running(byte_tokenizer, stop="é!")
    generation.apply(delta(b"x" + "é".encode()[:1]))
    submit = generation.submit()
    assert submit.samples[0].output_ids == [ord("x"), 0xC3]
    aborts = generation.apply(delta("é!".encode()[1:] + b"y", offset=2, request_id=submit.request_id))
    assert aborts == [Abort(request_id=submit.request_id, sample_index=0)]
    assert generation.full_output(0).text == "x"


@given(
    token_ids=st.lists(st.sampled_from([*b"ab !", *"é🎉".encode(), EOS]), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    overlap=st.integers(0, 3),
    restart_at=st.integers(0, 6),
)
def test_any_way_of_delivery_gives_the_same_text(
    byte_tokenizer: Tokenizer, token_ids: list[int], cuts: list[int], overlap: int, restart_at: int
) -> None:
    """Deltas of any size, repeated tokens, a restart in between and takes after each: the text is the full decoding
    up to the stop string, and the tokens are those up to its end."""
    whole = running(byte_tokenizer, stop="b!")
    whole.apply(delta(token_ids, finish_reason="length"))
    generation = running(byte_tokenizer, stop="b!")
    edges = sorted({0, len(token_ids), *(cut % (len(token_ids) + 1) for cut in cuts)})
    taken = []
    for number, (begin, end) in enumerate(itertools.pairwise(edges)):
        if number == restart_at and not generation.finished:
            generation.submit()
        begin = max(begin - overlap, 0)
        reason = "length" if end == len(token_ids) else None
        fields = {"offset": begin, "finish_reason": reason, "request_id": generation.request_id}
        generation.apply(delta(token_ids[begin:end], **fields))  # type: ignore[arg-type]
        taken.append(generation.take(0))
    outputs = [output for output in taken if output is not None]
    expected = byte_tokenizer.decode(token_ids).partition("b!")[0]
    assert "".join(output.text for output in outputs) == whole.full_output(0).text == expected
    assert [i for output in outputs for i in output.token_ids] == whole.full_output(0).token_ids
    assert generation.full_output(0) == whole.full_output(0)
    assert outputs[-1].finish_reason == whole.full_output(0).finish_reason


def test_a_resubmission_keeps_the_adapters_it_began_with(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, adapter="a", return_scalings=True)
    generation.apply(delta("x", adapter="a@3:1.0"))
    generation.apply(delta("y", offset=1))
    submit = generation.submit()
    assert (submit.adapter, submit.xlora, submit.return_scalings) == ("a@3:1.0", None, True)


def test_a_resubmission_without_adapters_gets_no_mix_that_came_since(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer)
    assert generation.submit().xlora is None
    generation.apply(delta("x", request_id=generation.request_id))
    assert generation.submit().xlora is False
