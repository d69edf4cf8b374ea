"""Models that own an engine: it loads with them, has their settings, and ends in order with the last of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.fakes.engine_runs import engine_pid, fake_launch, wait_until
from tests.fakes.fake_engine import expected_text
from trident_llm.errors import EngineFailed, NotFound, Overloaded, TridentError
from trident_llm.run_directory import EngineStatus
from trident_llm.server import engine_client, engine_ownership
from trident_llm.server.engine_client import EngineClient
from trident_llm.server.engine_watch import wait_for_end


def test_only_the_last_owner_ends_the_engine(open_door, run_directory):
    first, second = open_door(), open_door()
    pid = engine_pid(run_directory)
    first.client.close()
    assert not wait_for_end(pid, 0.3)
    assert second.finish(second.submit("hello", max_tokens=9)) == expected_text("hello", 9)
    second.client.close()
    assert wait_for_end(pid, 1.0)


def test_engine_that_does_not_load_gives_its_own_error_to_all(run_directory):
    launch = fake_launch(Path("/nowhere/does-not-load"))
    for _ in range(2):
        client = EngineClient(run_directory, launch=launch, owner_pid=os.getpid(), log=print)
        with pytest.raises(TridentError, match="the fake model does not load"):
            client.start()
    guest = EngineClient(run_directory, launch=None, owner_pid=os.getpid(), log=print)
    with pytest.raises(TridentError, match="the fake model does not load"):
        guest.start()


def test_model_loads_after_a_failed_load(run_directory, open_door):
    broken = fake_launch(Path("/nowhere/does-not-load"))
    with pytest.raises(TridentError, match="does not load"):
        EngineClient(run_directory, launch=broken, owner_pid=os.getpid(), log=print).start()
    door = open_door()
    assert door.finish(door.submit("hello", max_tokens=9)) == expected_text("hello", 9)


def test_failed_engine_ends_before_the_next_one_starts(run_directory, open_door):
    broken = fake_launch(Path("/nowhere/does-not-load-and-lingers"))
    with pytest.raises(TridentError, match="does not load"):
        EngineClient(run_directory, launch=broken, owner_pid=os.getpid(), log=print).start()
    lingers = engine_pid(run_directory)
    assert not wait_for_end(lingers, 0)
    door = open_door()
    assert wait_for_end(lingers, 0)
    assert door.finish(door.submit("hello", max_tokens=9)) == expected_text("hello", 9)


def test_failed_engine_that_does_not_end_keeps_nobody(run_directory, open_door, monkeypatch):
    monkeypatch.setattr(engine_ownership, "SHUTDOWN_WAIT", 0.1)
    run_directory.create()
    run_directory.write_launch(fake_launch(Path("/nowhere/does-not-load")))
    # This process stands for it.
    run_directory.write_status(EngineStatus(state="failed", pid=os.getpid(), error="[INTERNAL] does not load"))
    door = open_door()
    assert door.finish(door.submit("hello", max_tokens=9)) == expected_text("hello", 9)


def test_process_that_cannot_run_is_a_load_failure(run_directory, model_folder):
    launch = fake_launch(model_folder)
    for command in (["/nowhere/python"], [sys.executable, "-c", "raise SystemExit(7)"]):
        broken = type(launch)(parameters=launch.parameters, command=command)
        client = EngineClient(run_directory, launch=broken, owner_pid=os.getpid(), log=print)
        with pytest.raises(TridentError, match=r"could not be started|exit status 7"):
            client.start()


def test_other_settings_are_refused_while_the_engine_runs(open_door, model_folder):
    open_door()
    with pytest.raises(EngineFailed, match="other settings"):
        open_door(fake_launch(model_folder, max_num_seqs="3"))


def test_guest_without_owner_says_so(run_directory, monkeypatch):
    monkeypatch.setattr(engine_client, "OWNER_WAIT", 0.2)
    guest = EngineClient(run_directory, launch=None, owner_pid=os.getpid(), log=print)
    with pytest.raises(NotFound, match="no model of this server owns the engine"):
        guest.start()


def test_guest_fails_requests_when_the_owner_is_unloaded(open_door, run_directory, model_folder):
    owner = open_door(fake_launch(model_folder, drain_timeout="0.2"))
    guest_client = EngineClient(run_directory, launch=None, owner_pid=os.getpid(), log=print)
    guest = type(owner)(guest_client, guest_client.start())
    generation = guest.submit("hello", max_tokens=4000)
    wait_until(lambda: guest.num_running() == 1)
    owner.client.close()
    with pytest.raises(Overloaded, match="not loaded"):
        guest.finish(generation)
    again = open_door()
    assert again.finish(again.submit("hello", max_tokens=9)) == expected_text("hello", 9)
    wait_until(lambda: guest_client.ready)
    assert guest.finish(guest.submit("hello", max_tokens=9)) == expected_text("hello", 9)
    guest_client.close()


def test_engine_ends_with_its_owner_and_leaves_nothing(run_directory, model_folder):
    owner = subprocess.Popen(["sleep", "600"])
    client = EngineClient(run_directory, launch=fake_launch(model_folder), owner_pid=owner.pid, log=print)
    client.start()
    pid = engine_pid(run_directory)
    owner.kill()
    owner.wait()
    assert wait_for_end(pid, 1.0)
    wait_until(lambda: not run_directory.path.exists(), 1.0)
    client.close()
    assert not run_directory.path.exists()


def test_engine_that_hangs_at_shutdown_is_killed(open_door, run_directory, model_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(engine_ownership, "SHUTDOWN_WAIT", 0.3)
    door = open_door(fake_launch(model_folder, drain_timeout="0.2"))
    pid = engine_pid(run_directory)
    door.submit(f"<hang-once:{tmp_path}/hung>")
    wait_until((tmp_path / "hung").exists)
    began = time.monotonic()
    door.client.close()
    assert time.monotonic() - began < 2.0
    assert wait_for_end(pid, 0.0)


def test_requests_of_other_models_may_finish_when_the_owner_is_unloaded(open_door, run_directory, model_folder):
    owner = open_door(fake_launch(model_folder, drain_timeout="20"))
    guest_client = EngineClient(run_directory, launch=None, owner_pid=os.getpid(), log=print)
    guest = type(owner)(guest_client, guest_client.start())
    generation = guest.submit("hello", max_tokens=400)
    wait_until(lambda: guest.num_running() == 1)
    closing = threading.Thread(target=owner.client.close)
    closing.start()
    wait_until(lambda: not owner.client.ready)
    with pytest.raises(Overloaded, match=r"being ended|not loaded"):
        guest.finish(guest.submit("too late"))
    assert guest.finish(generation) == expected_text("hello", 400)
    closing.join(3.0)
    assert not closing.is_alive()
    guest_client.close()


def test_requests_of_other_models_get_what_is_left_of_drain_timeout(open_door, run_directory, model_folder):
    owner = open_door(fake_launch(model_folder, drain_timeout="20"))
    guest_client = EngineClient(run_directory, launch=None, owner_pid=os.getpid(), log=print)
    guest = type(owner)(guest_client, guest_client.start())
    assert owner.client.drain_timeout == guest_client.drain_timeout == 20
    generation = guest.submit("hello", max_tokens=4000)
    wait_until(lambda: guest.num_running() == 1)
    began = time.monotonic()
    owner.client.close(drained_for=19.5)
    assert 0.4 < time.monotonic() - began < 2.0
    with pytest.raises(Overloaded, match="not loaded"):
        guest.finish(generation)
    guest_client.close()


def test_sigterm_ends_the_process_cleanly(run_directory, model_folder):
    run_directory.create()
    launch = fake_launch(model_folder)
    run_directory.write_launch(launch)
    command = [*launch.command, "--run-dir", str(run_directory.path), "--owner-pid", str(os.getpid())]
    process = subprocess.Popen(command)
    wait_until(lambda: (status := run_directory.read_status()) is not None and status.state == "ready")
    process.terminate()
    assert process.wait(2.0) == 0
