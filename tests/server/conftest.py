"""Fixtures: run directories, and doors to fake engine processes that are gone when a test ends."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes import fake_backend_utils
from tests.fakes.byte_tokenizer import write_byte_tokenizer
from tests.fakes.engine_runs import Door, fake_launch, wait_until
from trident_llm.run_directory import Launch, RunDirectory
from trident_llm.server.engine_client import EngineClient
from trident_llm.server.engine_watch import wait_for_end

# The module exists inside the server's stub processes only.
sys.modules.setdefault("triton_python_backend_utils", fake_backend_utils)


@pytest.fixture
def run_directory() -> Iterator[RunDirectory]:
    # Not tmp_path: its names can be longer than a socket's path may be.
    with tempfile.TemporaryDirectory(prefix="trident-test-") as folder:
        yield RunDirectory(Path(folder) / "runs" / f"{os.getpid()}-llm")


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return write_byte_tokenizer(tmp_path / "model")


OpenDoor = Callable[..., Door]


@pytest.fixture
def open_door(run_directory: RunDirectory, model_folder: Path) -> Iterator[OpenDoor]:
    """``open_door(launch=None)``: a door of the model that owns the engine. All are closed at the end."""
    doors: list[Door] = []

    def open_one(launch: Launch | None = None) -> Door:
        client = EngineClient(
            run_directory, launch=launch or fake_launch(model_folder), owner_pid=os.getpid(), log=print
        )
        door = Door(client, client.start())
        doors.append(door)
        return door

    yield open_one
    status = run_directory.read_status()
    for door in doors:
        door.client.close()
    if status is not None:
        assert wait_for_end(status.pid, 3.0)
    wait_until(lambda: not run_directory.path.exists(), 3.0)
