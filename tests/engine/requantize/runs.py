"""Engines whose weights change while they serve, and what their requests get."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore
from trident_llm.protocol import SamplingParams, Submit

AWQ = {"isq_method": "awq", "isq_bits": 4}
_names = itertools.count()


def settings_of(folder: Path, **settings: Any) -> EngineConfig:
    fixed = {
        "device": "cpu", "dtype": "fp32", "num_threads": 1, "max_num_blocks": 64, "block_size": 8, "max_num_seqs": 4,
        "max_model_len": 128, "isq_calibration_samples": 4, "isq_calibration_length": 32,
    }  # fmt: skip
    return EngineConfig(model=str(folder), **{**fixed, **settings})


def submit(prompt: list[int], max_tokens: int = 12, **fields: Any) -> Submit:
    params = SamplingParams(seed=3, max_tokens=max_tokens, temperature=0.8, ignore_eos=True)
    return Submit(request_id=f"r{next(_names)}", prompt_ids=prompt, params=params, **fields)


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(5, 300), k=length)


PROMPTS = [prompt_of(20, seed) for seed in range(6)]


class Run:
    """An engine, and the tokens and errors of its requests."""

    def __init__(self, config: EngineConfig, **options: Any) -> None:
        self.core = EngineCore(config, **options)
        self.tokens: dict[str, list[int]] = {}
        self.errors: dict[str, str] = {}

    def add(self, *submits: Submit) -> None:
        for one in submits:
            self.core.add(one)

    def step(self) -> None:
        for delta in self.core.step() if self.core.has_work() else self.core.poll():
            name = f"{delta.request_id}/{delta.sample_index}" if delta.sample_index else delta.request_id
            self.tokens.setdefault(name, []).extend(delta.token_ids)
            if delta.error:
                self.errors[delta.request_id] = delta.error
        self.core.check_integrity()

    def until(self, done: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline
            self.step()

    def poll_until(self, done: Callable[[], bool]) -> None:
        """Let threads and commands go on, but compute no token."""
        deadline = time.monotonic() + 60.0
        while not done():
            assert time.monotonic() < deadline
            assert not self.core.poll()
            time.sleep(0.001)

    def finish(self, *submits: Submit) -> list[list[int]]:
        self.add(*submits)
        self.until(lambda: not self.core.has_work())
        return [self.tokens[one.request_id] for one in submits]

    def command(self, name: str, **arguments: Any) -> dict[str, Any]:
        reply: Future[dict[str, Any]] = self.core.run_command(name, arguments)
        self.poll_until(reply.done)
        return reply.result()

    def begin(self, **settings: Any) -> str:
        return str(self.command("requantize", settings=settings)["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        return self.command("job", id=job_id)

    def wait(self, job_id: str) -> dict[str, Any]:
        self.until(lambda: self.job(job_id)["state"] != "running")
        return self.job(job_id)


def fresh(folder: Path, *submits: Submit, **settings: Any) -> list[list[int]]:
    """What an engine says that has been loaded with these settings."""
    return Run(settings_of(folder, **settings)).finish(*submits)
