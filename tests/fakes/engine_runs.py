"""Fake engine processes and doors to them, for tests without a server."""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from trident_llm.generation import Generation
from trident_llm.options import RequestOptions
from trident_llm.protocol import Welcome
from trident_llm.run_directory import Launch, RunDirectory
from trident_llm.server.engine_client import EngineClient
from trident_llm.text import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


def fake_launch(model: Path, step_time: float = 0.002, **settings: str) -> Launch:
    """``model``: a folder with a byte tokenizer."""
    command = ["env", f"PYTHONPATH={ROOT}:{ROOT}/backend_src", sys.executable, "-m", "tests.fakes.fake_engine"]
    return Launch(parameters={"model": str(model), **settings}, command=[*command, "--step-time", str(step_time)])


def engine_pid(run_directory: RunDirectory) -> int:
    """Of the engine process that runs, or ran last."""
    status = run_directory.read_status()
    assert status is not None
    return status.pid


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """Seconds until ``condition`` held. Raises ``TimeoutError`` when it never did."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.005)
    return time.monotonic() - began


class Door:
    """A client with what it needs to make generations."""

    def __init__(self, client: EngineClient, welcome: Welcome) -> None:
        self.client = client
        self._welcome = welcome
        self._tokenizer = Tokenizer(Path(welcome.tokenizer_folder))

    def submit(self, prompt: str, **options: object) -> Generation:
        parsed = RequestOptions.parse(
            options,
            limits=self._welcome.limits,
            max_model_len=self._welcome.max_model_len,
            vocab_size=self._welcome.vocab_size,
        )
        generation = Generation(uuid.uuid4().hex, prompt, parsed, self._tokenizer, self._welcome)
        self.client.submit(generation, threading.Event().set)
        return generation

    def finish(self, generation: Generation, seconds: float = 20.0) -> str:
        """The text of the first sample, once all have ended. Raises the generation's error."""
        wait_until(lambda: self.is_finished(generation), seconds)
        if generation.error is not None:
            raise generation.error
        return generation.full_output(0).text

    def is_finished(self, generation: Generation) -> bool:
        with self.client.lock:
            return generation.finished

    def num_running(self) -> int:
        return int(self.client.command("stats", {})["running_requests"])
