"""Adapters of an engine process: commands through a door, and what a restarted process goes on with."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.adapters.helpers import AdaptedModel
from tests.fakes import fake_backend_utils
from tests.fakes.engine_runs import ROOT, Door, wait_until
from tests.fakes.fake_backend_utils import Tensor
from tests.fakes.peft_adapters import greedy
from trident_llm.errors import BadRequest, NotFound
from trident_llm.run_directory import Launch, RunDirectory
from trident_llm.server.engine_client import EngineClient

# The module exists inside the server's stub processes only.
sys.modules.setdefault("triton_python_backend_utils", fake_backend_utils)

PROMPT = "Hello"


@pytest.fixture
def run_directory() -> Iterator[RunDirectory]:
    with tempfile.TemporaryDirectory(prefix="trident-test-") as folder:
        yield RunDirectory(Path(folder) / "runs" / f"{os.getpid()}-llm")


@pytest.fixture
def door(adapted: AdaptedModel, run_directory: RunDirectory) -> Iterator[Door]:
    """To an engine process that has adapter a; the second adapter has a file of its own to change."""
    settings = {
        "model": str(adapted.folder), "dtype": "fp32", "device": "cpu", "num_threads": "1", "max_num_blocks": "128",
        "adapters": f"a={adapted.path('a')}", "adapter_root": str(adapted.root), "max_lora_rank": "8",
    }  # fmt: skip
    command = ["env", f"PYTHONPATH={ROOT}/backend_src", sys.executable, "-m", "trident_llm.engine.process"]
    launch = Launch(parameters=settings, command=command)
    client = EngineClient(run_directory, launch=launch, owner_pid=os.getpid(), log=print)
    yield Door(client, client.start())
    client.close()
    wait_until(lambda: not run_directory.path.exists(), 5.0)


def tokens_of(door: Door, adapter: str, num_tokens: int) -> list[int]:
    generation = door.submit(PROMPT, adapter=adapter, max_tokens=num_tokens, temperature=0, ignore_eos=True)
    door.finish(generation)
    return generation.samples[0].token_ids


def test_requests_through_a_door_get_what_was_loaded_through_another(door: Door, adapted: AdaptedModel) -> None:
    prompt = door.submit(PROMPT, max_tokens=1).prompt_ids
    assert tokens_of(door, "a", 12) == greedy(adapted.oracles["a"], prompt, 12)
    loaded = door.client.command("load_adapter", {"name": "late", "path": "c"}, timeout=60)
    assert (loaded["name"], loaded["generation"], loaded["dora"]) == ("late", 2, True)
    assert tokens_of(door, "late", 12) == greedy(adapted.oracles["c"], prompt, 12)
    with pytest.raises(BadRequest, match="lies outside adapter_root"):
        door.client.command("load_adapter", {"name": "late", "path": "/etc"}, timeout=60)
    door.client.command("unload_adapter", {"name": "late"}, timeout=60)
    with pytest.raises(NotFound, match="adapter: 'late' is not loaded; loaded: a"):
        tokens_of(door, "late", 2)


def test_a_crash_costs_neither_adapters_nor_a_running_request_its_generation(
    door: Door, adapted: AdaptedModel, run_directory: RunDirectory
) -> None:
    prompt = door.submit(PROMPT, max_tokens=1).prompt_ids
    running = door.submit(PROMPT, adapter="a", max_tokens=400, temperature=0, ignore_eos=True)
    wait_until(lambda: len(running.samples[0].token_ids) > 3, 60)
    door.client.command("load_adapter", {"name": "a", "path": "b"}, timeout=60)
    status = run_directory.read_status()
    assert status is not None and len(running.samples[0].token_ids) < 300
    os.kill(status.pid, signal.SIGKILL)
    door.finish(running, 120)
    assert running.samples[0].token_ids == greedy(adapted.oracles["a"], prompt, 400)
    assert tokens_of(door, "a", 12) == greedy(adapted.oracles["b"], prompt, 12)


class _Request:
    def __init__(self, command: str, **arguments: Any) -> None:
        self._texts = {"command": command, "arguments": json.dumps(arguments)}

    def tensor(self, name: str) -> Tensor:
        return Tensor(name, np.array([self._texts[name].encode()], dtype=np.object_))


def test_the_admin_door(door: Door, run_directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    from trident_llm.server import admin

    monkeypatch.setattr(
        admin.pb_utils, "get_input_tensor_by_name", lambda request, name: request.tensor(name), raising=False
    )
    admin_door = admin.AdminDoor(door.client, run_directory)

    def ask(command: str, **arguments: Any) -> Any:
        (response,) = admin_door.execute([_Request(command, **arguments)])
        return response.error.text if response.error else json.loads(response.output_tensors[0].array[0])

    assert ask("load_adapter", name="n", path="b", pinned=True)["pinned"] is True
    assert [adapter["name"] for adapter in ask("list_adapters")["adapters"]] == ["a", "n"]
    assert ask("unload_adapter", name="n") == {"name": "n", "generation": 2, "users": 0}
    for arguments, reason in [
        ({"name": "n"}, "[INVALID_ARG] arguments: 'load_adapter' needs 'path'"),
        ({"name": 3, "path": "b"}, "[INVALID_ARG] name: 3 is not allowed; give a string"),
        ({"name": "n", "path": "b", "pinned": 1}, "[INVALID_ARG] pinned: 1 is not allowed; give true or false"),
        ({"name": "../n", "path": "b"}, "[INVALID_ARG] name: '../n' is no name of an adapter"),
        ({"name": "n", "path": "b", "rank": 1}, "'rank' is not an argument of 'load_adapter'; allowed: name, path"),
        ({"name": "n", "path": "nowhere"}, "[NOT_FOUND] adapter 'n': 'nowhere' is no folder below adapter_root"),
    ]:
        assert reason in ask("load_adapter", **arguments)
