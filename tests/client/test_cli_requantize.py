"""The command line's requantize, calibrate and jobs, against a fake server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.fakes.fake_triton import FakeTriton
from trident_client import AsyncTridentClient, TridentClient, cli_requantize
from trident_client.cli import EXIT_BAD_REQUEST, EXIT_FAILED, main
from trident_client.deadline import Deadline

BEGUN = {"id": "ab12", "command": "requantize", "state": "running", "progress": "starting", "error": "", "seconds": 0.0}
DONE = {**BEGUN, "state": "done", "progress": "quantized in 1.0 s", "seconds": 1.5}
FAILED = {**BEGUN, "state": "failed", "error": "[INTERNAL] no luck"}
KEPT = {"collecting": False, "requests": 9, "samples": 3, "tokens": 72}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_requantize, "_POLL_SECONDS", 0.01)


def run(server: FakeTriton, *words: str) -> int:
    return main([*words, "--url", server.url])


def test_requantize_follows_its_job(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeTriton() as server:
        server.results |= {"requantize": BEGUN, "job": DONE}
        words = ("--method", "awq", "--bits", "4", "--set", "isq_layers=lm_head=none", "--admin-token", "s")
        assert run(server, "requantize", *words) == 0
        settings = {"isq_method": "awq", "isq_bits": "4", "isq_layers": "lm_head=none"}
        assert server.commands == [
            ("requantize", {"admin_token": "s", "settings": settings}),
            ("job", {"admin_token": "s", "id": "ab12"}),
        ]
        told = capsys.readouterr()
        assert told.out == "done in 1.5 s: quantized in 1.0 s\n" and told.err == "job ab12\nstarting\n"
        server.results["job"] = FAILED
        assert run(server, "requantize", "--method", "awq") == EXIT_FAILED
        assert capsys.readouterr().err.endswith("trident: error: [INTERNAL] no luck\n")
        server.results["job"] = BEGUN
        assert run(server, "requantize", "--method", "awq", "--timeout", "0.3") == EXIT_FAILED
        assert "the job did not end within the timeout; it goes on" in capsys.readouterr().err
        assert run(server, "requantize", "--method", "awq", "--no-wait") == 0
        assert capsys.readouterr().out == "job ab12; trident jobs tells how it stands\n"
        assert run(server, "requantize") == EXIT_BAD_REQUEST
        assert "no settings are given" in capsys.readouterr().err


def test_a_pause_that_outlasts_the_timeout_is_no_wrong_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Deadline, "cut", lambda self, delay, problem: 0.4)
    with FakeTriton() as server:
        server.results |= {"requantize": BEGUN, "job": BEGUN}
        assert run(server, "requantize", "--method", "awq", "--timeout", "0.3") == EXIT_FAILED
        assert "the job did not end within the timeout; it goes on" in capsys.readouterr().err


def test_calibrate_and_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeTriton() as server:
        server.results |= {"calibrate": KEPT, "job": DONE, "jobs": {"jobs": [DONE]}}
        assert run(server, "calibrate", "start", "--max-samples", "3") == 0
        assert run(server, "calibrate", "stop") == 0
        server.results["calibrate"] = BEGUN
        assert run(server, "calibrate", "apply", "--method", "gptq") == 0
        assert run(server, "calibrate", "apply", "--json") == 0
        assert run(server, "jobs") == 0
        assert server.commands == [
            ("calibrate", {"action": "start", "max_samples": 3}),
            ("calibrate", {"action": "stop"}),
            ("calibrate", {"action": "apply", "settings": {"isq_method": "gptq"}}),
            ("job", {"id": "ab12"}),
            ("calibrate", {"action": "apply"}),
            ("job", {"id": "ab12"}),
            ("jobs", {}),
        ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "collecting tokens of requests with the option calibration",
        "72 tokens kept, of 3 of 9 requests",
        "done in 1.5 s: quantized in 1.0 s",
    ]
    assert json.loads("\n".join(lines[3:-2])) == DONE
    assert lines[-2:] == [
        "id    command     state  seconds  progress            error",
        "ab12  requantize  done   1.5      quantized in 1.0 s",
    ]


def test_both_clients_have_the_commands() -> None:
    answers: list[Any] = []
    with FakeTriton() as server:
        server.results |= {"requantize": BEGUN, "calibrate": KEPT, "job": DONE, "jobs": {"jobs": [DONE]}}

        async def use() -> None:
            async with AsyncTridentClient(server.url) as client:
                answers.append(await client.requantize({"isq_method": "rtn"}))
                answers.append(await client.calibrate("start", max_length=5))
                answers.append(await client.job("ab12"))
                answers.append(await client.jobs())

        asyncio.run(use())
        with TridentClient(server.url) as client:
            answers.append(client.requantize({"isq_method": "rtn"}))
            answers.append(client.calibrate("start", max_length=5))
            answers.append(client.job("ab12"))
            answers.append(client.jobs())
        expected = [
            ("requantize", {"settings": {"isq_method": "rtn"}}), ("calibrate", {"action": "start", "max_length": 5}),
            ("job", {"id": "ab12"}), ("jobs", {}),
        ]  # fmt: skip
        assert server.commands == expected * 2
    assert answers == [BEGUN, KEPT, DONE, [DONE]] * 2
