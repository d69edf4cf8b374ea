"""What is refused before weights change, and what is served when changing them fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.requantize.runs import AWQ, PROMPTS, Run, fresh, settings_of, submit
from trident_llm.engine import requantize
from trident_llm.errors import BadRequest, LoadFailed, NotFound, Overloaded, TridentError
from trident_llm.run_directory import RunDirectory


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, after: int = 0) -> list[int]:
    """Have ``owner.name`` raise ``error`` at one call."""
    calls, original = [0], getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == after + 1:
            raise error
        return original(*args, **options)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("both_fit", [True, False])
@pytest.mark.parametrize("where", ["build", "capture", "journal"])
def test_a_failure_leaves_the_old_weights(folder, monkeypatch, tmp_path, where, both_fit):
    if not both_fit:
        monkeypatch.setattr(requantize, "free_bytes", lambda device: 0)
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    run = Run(settings_of(folder, isq_method="rtn"), journal=directory)
    waiting = submit(PROMPTS[0])
    owner, name = {
        "build": (run.core.model.source, "build"), "capture": (run.core.runner, "capture"),
        "journal": (directory, "write_requantized"),
    }[where]  # fmt: skip
    fail_once(monkeypatch, owner, name, LoadFailed("no luck") if where == "build" else OSError("no luck"))
    job = run.begin(**AWQ)
    run.add(waiting)
    failed = run.wait(job)
    assert failed["state"] == "failed" and "no luck" in failed["error"] and failed["error"].startswith("[INTERNAL]")
    run.until(lambda: not run.core.has_work())
    assert run.tokens[waiting.request_id] == fresh(folder, waiting, isq_method="rtn")[0]
    assert run.core.config.isq_method == "rtn" and directory.read_requantized() is None
    after = submit(PROMPTS[1])
    assert run.wait(run.begin(**AWQ))["state"] == "done"
    assert run.core.stats()["requantize_jobs"] == {"running": 0, "done": 1, "failed": 1}
    assert run.finish(after) == fresh(folder, after, **AWQ)
    run.core.close()


def test_weights_that_do_not_fit_after_all_are_made_once_the_old_ones_are_gone(folder, run, monkeypatch):
    calls = fail_once(monkeypatch, run.core.model.source, "build", torch.OutOfMemoryError("too large"))
    assert run.wait(run.begin(**AWQ))["state"] == "done" and calls == [2]
    after = submit(PROMPTS[1])
    assert run.finish(after) == fresh(folder, after, **AWQ)


def test_an_engine_that_cannot_go_back_ends(folder, monkeypatch):
    run = Run(settings_of(folder))
    monkeypatch.setattr(requantize, "free_bytes", lambda device: 0)
    monkeypatch.setattr(run.core.model.source, "build", lambda *args: (_ for _ in ()).throw(LoadFailed("gone")))
    with pytest.raises(TridentError, match="the weights of before cannot be served again"):
        run.wait(run.begin(**AWQ))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"settings: none are given; give some of isq_method, isq_bits, "),
        ({"dtype": "fp16"}, r"settings: 'dtype' is not about quantization; allowed: isq_method, "),
        ({"isq_method": "magic"}, r"isq_method: 'magic' is not one of rtn, awq, gptq, "),
        ({"isq_method": "smoothquant", "isq_bits": 4}, r"isq_bits: smoothquant has no 4 bits; allowed: 8"),
        ({"isq_bits": 4}, r"isq_bits: 4 is set, but isq_method is none"),
        ({"isq_bits": "four"}, r"isq_bits: 'four' is not an integer from 4 to 8"),
        ({"isq_layers": ["0=rtn"]}, r"isq_layers: \['0=rtn'\] is not allowed; give a string, a number, true or false"),
        ({"isq_method": "awq", "isq_calibration": "/gone.txt"}, r"isq_calibration: '/gone.txt' cannot be read"),
        ({"isq_method": "awq", "isq_calibration": "/dev/zero"}, r"isq_calibration: '/dev/zero' is no file"),
    ],
)
def test_bad_settings_are_refused_before_anything_happens(run, settings, message):
    with pytest.raises(BadRequest, match=message):
        run.command("requantize", settings=settings)
    assert run.command("jobs") == {"jobs": []} and not run.core.is_loading


def test_one_at_a_time_and_jobs_have_names(run):
    job = run.begin(isq_method="rtn")
    with pytest.raises(Overloaded, match="requantize: the weights are being changed already"):
        run.command("requantize", settings={"isq_method": "awq"})
    with pytest.raises(NotFound, match="id: no job 'x' in this engine process"):
        run.job("x")
    assert run.wait(job)["state"] == "done"
    back = run.wait(run.begin(isq_method=""))
    assert back["progress"] == "all weights are in full precision" and run.core.stats()["quantization"] is None
    assert run.core.stats()["requantize_jobs"] == {"running": 0, "done": 2, "failed": 0}
