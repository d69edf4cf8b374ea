"""Which submissions wait, and for whom, when the engine has died before."""

from __future__ import annotations

import pytest

from trident_llm.deaths import Deaths
from trident_llm.engine import probation
from trident_llm.engine.probation import Probation
from trident_llm.errors import EngineFailed
from trident_llm.protocol import Delta, FinishReason, SampleStart, SamplingParams, Submit

DOOR = b"door"


class Trial:
    """A probation, and what it wanted written down."""

    def __init__(self, **deaths: dict[str, int]) -> None:
        self.written: list[Deaths] = []
        self.probation = Probation(Deaths(**deaths), self.written.append)

    def hold(self, request_id: str, door: bytes = DOOR) -> bool:
        return self.probation.hold(door, Submit(request_id=request_id, prompt_ids=[1], params=PARAMS))

    def release(self, *, core_has_work: bool = False) -> list[str]:
        return [item.submit.request_id for item in self.probation.release(core_has_work=core_has_work)]

    def saw(self, request_id: str, token_id: int, finish_reason: FinishReason | None = None) -> bool:
        return self.probation.saw(
            Delta(
                request_id=request_id, sample_index=0, offset=0, token_ids=[token_id], finish_reason=finish_reason
            )
        )


PARAMS = SamplingParams(seed=1, max_tokens=9)


@pytest.fixture(autouse=True)
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probation, "TRIAL_TOKENS", 2)


def test_without_suspects_nobody_waits():
    trial = Trial(counts={"a": 1})
    assert not trial.hold("a.1") and not trial.hold("b")
    assert trial.release() == [] and not trial.probation.is_active


def test_each_suspect_runs_alone_and_then_all_others():
    trial = Trial(counts={"a": 2, "b": 3, "c": 1})
    assert all(trial.hold(name) for name in ("c.1", "a.1", "new", "b.2"))
    assert trial.release() == ["a.1"]
    assert trial.release() == [] and trial.hold("later")
    assert not trial.saw("a.1", 7)
    assert trial.release() == []
    assert trial.saw("a.1", 8), "the core is to let go of it, for b"
    assert trial.written[-1].counts == {"b": 3, "c": 1}
    assert trial.release(core_has_work=True) == []
    assert trial.release() == ["b.2"]
    assert not trial.saw("b.2", 1) and not trial.saw("b.2", 2), "nobody else is to be tried"
    assert trial.written[-1].counts == {"c": 1}
    released = trial.probation.release(core_has_work=True)
    assert [item.submit.request_id for item in released] == ["a.1", "c.1", "new", "later"]
    assert released[0].submit.samples == [SampleStart(index=0, output_ids=[7, 8])]
    assert not trial.probation.is_active and not trial.hold("next")


def test_a_suspect_that_ends_is_acquitted():
    trial = Trial(counts={"a": 2, "b": 2})
    assert trial.hold("a.1") and trial.hold("b.1")
    assert trial.release() == ["a.1"]
    trial.probation.ended("a.1")
    assert trial.release() == ["b.1"]
    assert not trial.saw("b.1", 1)
    assert not trial.saw("b.1", 2, finish_reason="stop")
    assert trial.written[-1].counts == {} and trial.release() == []


def test_others_wait_for_suspects_to_come_back_but_not_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probation, "ARRIVAL_SECONDS", -1.0)
    trial = Trial(counts={"gone": 2})
    assert not trial.hold("new")
    monkeypatch.setattr(probation, "ARRIVAL_SECONDS", 100.0)
    trial = Trial(counts={"gone": 2})
    assert trial.hold("new") and trial.release() == []


def test_what_is_given_up_does_not_come_back():
    trial = Trial(counts={"a": 2, "b": 2})
    for name, door in (("a.1", DOOR), ("b.1", b"other"), ("c", DOOR), ("d", b"other")):
        assert trial.hold(name, door)
    trial.probation.ended("a.1")
    trial.probation.forget_door(b"other")
    assert trial.release() == ["c"]


def test_the_condemned_are_refused():
    trial = Trial(condemned={"a": 3})
    with pytest.raises(EngineFailed, match="broke 3 times while it served this request, the last time nothing else"):
        trial.probation.check(Submit(request_id="a.4", prompt_ids=[1], params=PARAMS))
    trial.probation.check(Submit(request_id="b", prompt_ids=[1], params=PARAMS))
