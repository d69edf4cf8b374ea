"""Weights that are calibrated on the requests of a serving engine."""

from __future__ import annotations

import pytest

from tests.engine.requantize.runs import PROMPTS, fresh, prompt_of, submit
from trident_llm.errors import BadRequest


def test_calibration_on_live_requests(folder, run):
    assert run.command("calibrate", action="start", max_samples=3, max_length=24)["collecting"]
    told = [submit(prompt_of(30, 50 + index), 6, calibration=True) for index in range(5)]
    run.finish(submit(PROMPTS[0]), *told)
    counts = run.command("calibrate", action="stop")
    assert counts == {"collecting": False, "requests": 5, "samples": 3, "tokens": 72}
    run.finish(submit(PROMPTS[1], calibration=True))
    assert run.core.stats()["calibration"] == counts
    with pytest.raises(BadRequest, match="calibrate: isq_method none calibrates nothing"):
        run.command("calibrate", action="apply")
    with pytest.raises(BadRequest, match="calibrate: isq_cache is false"):
        run.command("calibrate", action="apply", settings={"isq_method": "gptq", "isq_cache": False})
    with pytest.raises(BadRequest, match="what was collected has 72 tokens; at least 100 are needed"):
        run.command("calibrate", action="apply", settings={"isq_method": "gptq", "isq_calibration_length": 100})
    shipped = {"isq_method": "gptq", "isq_calibration_length": 24}
    collected = [list(sample) for sample in run.core.live_text._samples]
    reply = run.command("calibrate", action="apply", settings=shipped)
    assert run.wait(reply["id"])["state"] == "done"
    assert run.core.stats()["calibration"] == {"collecting": False, "requests": 0, "samples": 0, "tokens": 0}
    asked = submit(PROMPTS[2])
    assert all(sample in [(one.prompt_ids)[:24] for one in told] for sample in collected)
    assert run.finish(asked) != fresh(folder, asked, **shipped)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "go"}, "action: 'go' is not one of start, stop, apply"),
        ({"action": "start", "max_samples": 0}, "max_samples: 0 is not allowed; give an integer from 1 to 8192"),
        ({"action": "stop", "max_length": 5}, "'max_length' is not an argument of calibrate stop; allowed: action"),
        ({"action": "apply", "settings": "x"}, "settings: 'x' is not allowed; give a JSON object"),
        ({}, "'calibrate' needs 'action'"),
    ],
)
def test_bad_arguments_of_calibrate(run, arguments, message):
    with pytest.raises(BadRequest, match=message):
        run.command("calibrate", **arguments)
