"""A real server whose engine, doors or itself are killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.fakes.engine_runs import wait_until
from tests.fakes.fake_engine import expected_text
from tests.live.live_server import LiveServer, serve_fake
from tests.live.requests import GrpcStream, admin, generate, metrics, text_of, wait_until_running
from trident_llm.errors import LoadFailed
from trident_llm.launch.run_folder import SHARED_MEMORY
from trident_llm.run_directory import RunDirectory
from trident_llm.server.engine_watch import wait_for_end

pytestmark = pytest.mark.live
ARGUMENTS = ("--doors", "2", "--set", "max_queue_size=256", "--set", "admin_token=secret")
"""Two doors of llm: each costs the server a second when it ends."""


def kill_engine(server: LiveServer) -> None:
    server.find_process("fake_engine").send_signal(signal.SIGKILL)


def run_folders(server: LiveServer) -> list[Path]:
    return list(server.run.path.glob("[0-9]*-*"))


def wait_until_healthy(server: LiveServer, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not admin(server, "health")["ready"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_killed_engine_costs_no_token_in_either_door(tmp_path: Path):
    with serve_fake(tmp_path, *ARGUMENTS) as server:
        with GrpcStream(server, "llm") as first, GrpcStream(server, "llm_vllm") as second:
            first.submit("first", stream=True, max_tokens=200)
            second.submit("second", stream=True, max_tokens=200)
            wait_until_running(server, 2)
            time.sleep(0.5)
            kill_engine(server)
            assert text_of(first.until_final()) == expected_text("first", 200)
            assert text_of(second.until_final()) == expected_text("second", 200)
        assert admin(server, "health") == {"ready": True, "engine_restarts": 1}
        time.sleep(0.7)
        assert metrics(server)["trident_engine_restarts_total"] == 1
        before = metrics(server)["trident_output_tokens_total"]

        answer = generate(server, "llm", "<crash>")
        assert answer.body["error"].startswith("[INTERNAL] the engine broke 2 times while it served this request")
        wait_until_healthy(server)
        assert generate(server, "llm", "hello", max_tokens=9).body["text_output"] == expected_text("hello", 9)
        time.sleep(0.7)
        assert metrics(server)["trident_output_tokens_total"] >= before + 9

        (folder,) = run_folders(server)
        engine = server.find_process("fake_engine")
        os.kill(server.find_process("bin/tritonserver").pid, signal.SIGKILL)
        assert wait_for_end(engine.pid, 1.0)
        assert not RunDirectory(folder).path.exists()


def test_other_door_takes_over_when_a_stub_is_killed(tmp_path: Path):
    with serve_fake(tmp_path, *ARGUMENTS) as server:
        (folder,) = run_folders(server)
        engine = server.find_process("fake_engine")
        holder = engine.parent()
        assert holder is not None
        # Any door may hold the engine; a stream ends with its own door, so it goes through the other model.
        is_vllm = holder.cmdline()[-2].startswith("llm_vllm_")
        model = "llm" if is_vllm else "llm_vllm"
        with GrpcStream(server, model) as stream:
            stream.submit("hello", stream=True, max_tokens=300)
            wait_until_running(server)
            holder.kill()
            time.sleep(0.3)
            assert engine.is_running()
            kill_engine(server)
            assert text_of(stream.until_final()) == expected_text("hello", 300)
        wait_until(lambda: (status := RunDirectory(folder).read_status()) is not None and status.pid != engine.pid)
        wait_until_healthy(server)
        options = {} if is_vllm else {"exclude_input_in_output": True}
        answer = generate(server, model, "hello", max_tokens=9, **options)
        assert answer.body["text_output"] == expected_text("hello", 9)
        time.sleep(0.7)
        assert metrics(server)["trident_engine_ready"] == 1
        assert RunDirectory(folder).exists()
        pid, prefix = server.find_process("fake_engine").pid, server.run.shared_memory_prefix
    assert wait_for_end(pid, 0.0)
    assert not list(SHARED_MEMORY.glob(f"{prefix}*"))


def test_streams_may_finish_when_the_server_is_told_to_end(tmp_path: Path):
    with serve_fake(tmp_path, *ARGUMENTS, "--set", "drain_timeout=10") as server:
        with GrpcStream(server, "llm") as first, GrpcStream(server, "llm_vllm") as second:
            first.submit("first", stream=True, max_tokens=300)
            second.submit("second", stream=True, max_tokens=300)
            wait_until_running(server, 2)
            pid = server.find_process("bin/tritonserver").pid
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(OSError):
                generate(server, "llm", "late", max_tokens=1)
            assert text_of(first.until_final()) == expected_text("first", 300)
            assert text_of(second.until_final()) == expected_text("second", 300)
        assert wait_for_end(pid, 5.0)
        assert not run_folders(server)


def test_engine_that_does_not_load_gives_its_text_to_the_log(tmp_path: Path):
    broken = serve_fake(tmp_path, *ARGUMENTS, "--set", "revision=broken")
    with pytest.raises(LoadFailed, match=r"\[INTERNAL\] the fake model does not load"), broken:
        pass


def test_engine_goes_and_comes_with_the_model_that_owns_it(tmp_path: Path):
    with serve_fake(tmp_path, *ARGUMENTS, "--only", "llm,llm_vllm,llm_admin") as server:
        client = server.grpc_client()
        client.unload_model("llm")
        wait_until(lambda: not run_folders(server), 20.0)
        wait_until(lambda: generate(server, "llm_vllm", "hello").status == 400, 5.0)
        answer = generate(server, "llm_vllm", "hello")
        assert answer.body["error"] == "[UNAVAILABLE] the model that owns the engine is not loaded; retry after 2 s"
        client.load_model("llm")
        wait_until_healthy(server)
        for model in ("llm", "llm_vllm"):
            answer = generate(server, model, "hello", max_tokens=9, exclude_input_in_output=True)
            assert answer.body["text_output"] == expected_text("hello", 9)
        client.close()
