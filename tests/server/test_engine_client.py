"""Doors and the engine process: round trips, crashes, restarts and orderly ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.fakes.engine_runs import ROOT, fake_launch, wait_until
from tests.fakes.fake_engine import expected_text
from trident_llm.deaths import Deaths
from trident_llm.errors import EngineFailed, LoadFailed, NotFound, Overloaded, TridentError
from trident_llm.run_directory import EngineStatus, RunDirectory
from trident_llm.server import engine_client
from trident_llm.server.engine_client import EngineClient
from trident_llm.server.engine_watch import wait_for_end


def engine_pid(run_directory: RunDirectory) -> int:
    status = run_directory.read_status()
    assert status is not None
    return status.pid


def test_generates_text(open_door):
    door = open_door()
    generations = [door.submit(f"prompt {index}", max_tokens=20 + index, n=2) for index in range(20)]
    for index, generation in enumerate(generations):
        assert door.finish(generation) == expected_text(f"prompt {index}", 20 + index)
        assert generation.full_output(1).text == expected_text(f"prompt {index}", 20 + index, sample_index=1)
    assert door.num_running() == 0


def test_stop_string_frees_the_sequence(open_door):
    door = open_door()
    text = expected_text("hello", 40)
    generation = door.submit("hello", max_tokens=4000, stop=text[10:13])
    assert door.finish(generation) == text[:10]
    wait_until(lambda: door.num_running() == 0, 1.0)


def test_cancel_frees_the_sequence(open_door):
    door = open_door()
    generation = door.submit("hello", max_tokens=4000)
    wait_until(lambda: door.num_running() == 1)
    door.client.cancel(generation)
    wait_until(lambda: door.num_running() == 0, 1.0)
    assert generation.full_output(0).finish_reason == "cancelled"


def test_suspended_generation_goes_on_where_it_stood(open_door):
    door = open_door()
    generation = door.submit("hello", max_tokens=300)
    wait_until(lambda: len(generation.samples[0].token_ids) > 20)
    door.client.suspend(generation)
    wait_until(lambda: door.num_running() == 0, 1.0)
    assert not door.is_finished(generation)
    door.client.submit(generation, lambda: None)
    assert door.finish(generation) == expected_text("hello", 300)


def test_error_of_the_engine_reaches_its_request_alone(open_door, model_folder):
    door = open_door(fake_launch(model_folder, max_num_seqs="2", max_queue_size="1"))
    running = [door.submit("hello", max_tokens=500) for _ in range(3)]
    wait_until(lambda: door.num_running() == 3)
    with pytest.raises(Overloaded, match="the queue is full"):
        door.finish(door.submit("hello", max_tokens=5))
    assert door.finish(running[0]) == expected_text("hello", 500)


def test_crash_costs_no_token(open_door, tmp_path):
    door = open_door()
    prompt = f"<crash-once:{tmp_path}/crashed> hello"
    others = [door.submit(f"other {index}", max_tokens=600) for index in range(8)]
    assert door.finish(door.submit(prompt, max_tokens=50)) == expected_text(prompt, 50)
    for index, other in enumerate(others):
        assert door.finish(other) == expected_text(f"other {index}", 600)
    assert (tmp_path / "crashed").exists()
    assert door.client.num_restarts == 1


def test_killed_engine_is_restarted(open_door, run_directory):
    door = open_door()
    generation = door.submit("hello", max_tokens=1000)
    wait_until(lambda: len(generation.samples[0].token_ids) > 20)
    os.kill(engine_pid(run_directory), signal.SIGKILL)
    assert door.finish(generation) == expected_text("hello", 1000)


def test_a_request_that_was_alone_in_two_deaths_is_refused(open_door):
    door = open_door()
    door.finish(door.submit("hello", max_tokens=5))
    with pytest.raises(EngineFailed, match="broke 2 times while it served this request, the last time nothing else"):
        door.finish(door.submit("<crash> now", max_tokens=5))
    assert door.finish(door.submit("hello", max_tokens=30)) == expected_text("hello", 30)
    assert door.client.num_restarts == 2


def test_a_request_that_cannot_even_be_taken_in_is_refused(open_door):
    door = open_door()
    with pytest.raises(EngineFailed, match="broke 2 times"):
        door.finish(door.submit("<refuse>", max_tokens=5))
    assert door.finish(door.submit("hello", max_tokens=30)) == expected_text("hello", 30)


def test_poison_in_a_crowd_is_found_and_nobody_else_is_harmed(open_door):
    door, other_door = open_door(), open_door()
    crowd = [(d, d.submit(f"{index}", max_tokens=400)) for index in range(6) for d in (door, other_door)]
    poison = [door.submit("<crash:7> a", max_tokens=50), other_door.submit("<crash:3> b", max_tokens=50)]
    for guilty in poison:
        with pytest.raises(EngineFailed, match="broke 3 times"):
            door.finish(guilty)
    for index, (d, generation) in enumerate(crowd):
        assert d.finish(generation) == expected_text(f"{index // 2}", 400)
    # Three deaths for the first; the other was in one or two of them, and alone in its last.
    assert 4 <= door.client.num_restarts <= 5


def test_a_step_that_hangs_is_ended(open_door, model_folder, tmp_path):
    door = open_door(fake_launch(model_folder, step_timeout="0.5"))
    other = door.submit("other", max_tokens=600)
    prompt = f"<hang-once:{tmp_path}/hung>"
    assert door.finish(door.submit(prompt, max_tokens=50)) == expected_text(prompt, 50)
    assert door.finish(other) == expected_text("other", 600)
    assert door.client.num_restarts == 1


def test_signals_from_outside_condemn_nobody(open_door, run_directory, monkeypatch):
    monkeypatch.setattr("trident_llm.server.engine_watch.FIRST_BACKOFF", 0.01)
    door = open_door()
    generation = door.submit("hello", max_tokens=2000)
    for _ in range(5):
        pid, count = engine_pid(run_directory), len(generation.samples[0].token_ids)
        wait_until(lambda count=count: len(generation.samples[0].token_ids) > count)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: door.client.ready and engine_pid(run_directory) != pid)
    assert door.finish(generation) == expected_text("hello", 2000)
    assert run_directory.read_deaths() == Deaths(total=5)


@pytest.mark.parametrize("limit", [1, 3])
def test_an_engine_that_ends_in_a_row_without_a_step_stays_down(
    open_door, run_directory, model_folder, monkeypatch, limit
):
    monkeypatch.setattr("trident_llm.server.engine_watch.FIRST_BACKOFF", 0.01)
    door = open_door(fake_launch(model_folder, max_engine_failures=str(limit)))
    for _ in range(limit - 1):
        pid = engine_pid(run_directory)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: door.client.ready and engine_pid(run_directory) != pid)
    os.kill(engine_pid(run_directory), signal.SIGSTOP)
    generation = door.submit("hello", max_tokens=4000)
    os.kill(engine_pid(run_directory), signal.SIGKILL)
    with pytest.raises(Overloaded, match="stays down"):
        door.finish(generation)
    assert not door.client.ready
    with pytest.raises(Overloaded, match=f"{limit} times in a row without completing a step"):
        door.submit("hello")


def test_overload_is_refused_while_a_step_runs(open_door, model_folder):
    settings = {"max_num_seqs": "2", "max_queue_size": "1", "max_queue_wait": "0.5"}
    door = open_door(fake_launch(model_folder, step_time=0.5, **settings))
    running = [door.submit("hello", max_tokens=4) for _ in range(3)]
    wait_until(lambda: door.num_running() == 3)
    began = time.monotonic()
    with pytest.raises(Overloaded, match=r"full \(max_queue_size 1, max_queue_wait 0.5 s\); retry after 2 s"):
        door.submit("hello")
    assert time.monotonic() - began < 0.1
    assert [door.finish(generation) for generation in running] == [expected_text("hello", 4)] * 3
    assert door.finish(door.submit("hello", max_tokens=2)) == expected_text("hello", 2)


def test_command_while_the_engine_is_down_says_when_to_retry(open_door, run_directory):
    door = open_door()
    os.kill(engine_pid(run_directory), signal.SIGKILL)
    wait_until(lambda: not door.client.ready)
    with pytest.raises(Overloaded, match="retry after"):
        door.client.command("stats", {})
    wait_until(lambda: door.client.ready)
    assert door.client.command("health", {})["ready"] is True
    assert door.client.command("config", {})["block_size"] == 16
    with pytest.raises(TridentError, match="'reboot' is not one of stats, config, health"):
        door.client.command("reboot", {})


def test_second_door_takes_over_the_watch(open_door, run_directory, model_folder):
    # The first door is another process, which is killed: the kernel then frees its lock.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/backend_src"}
    command = [sys.executable, "-m", "tests.fakes.fake_door", str(run_directory.path), str(os.getpid())]
    holder = subprocess.Popen([*command, str(model_folder)], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        while (line := holder.stdout.readline()) != "holder\n":
            assert line, "the first door ended"
        door = open_door()
        assert not door.client.is_watch_holder
        pid = engine_pid(run_directory)
        holder.kill()
        holder.wait()
        wait_until(lambda: door.client.is_watch_holder, 2.0)
        assert engine_pid(run_directory) == pid
        generation = door.submit("hello", max_tokens=500)
        wait_until(lambda: len(generation.samples[0].token_ids) > 5)
        os.kill(pid, signal.SIGKILL)
        assert door.finish(generation) == expected_text("hello", 500)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_only_the_last_owner_ends_the_engine(open_door, run_directory):
    first, second = open_door(), open_door()
    pid = engine_pid(run_directory)
    first.client.close()
    assert not wait_for_end(pid, 0.3)
    assert second.finish(second.submit("hello", max_tokens=9)) == expected_text("hello", 9)
    second.client.close()
    assert wait_for_end(pid, 1.0)
    first.client.close = second.client.close = lambda: None


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
    owner.client.close = lambda: None
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
    monkeypatch.setattr(engine_client, "SHUTDOWN_WAIT", 0.3)
    door = open_door(fake_launch(model_folder, drain_timeout="0.2"))
    pid = engine_pid(run_directory)
    door.submit(f"<hang-once:{tmp_path}/hung>")
    wait_until((tmp_path / "hung").exists)
    began = time.monotonic()
    door.client.close()
    assert time.monotonic() - began < 2.0
    assert wait_for_end(pid, 0.0)
    door.client.close = lambda: None


def test_requests_of_other_models_may_finish_when_the_owner_is_unloaded(open_door, run_directory, model_folder):
    owner = open_door(fake_launch(model_folder, drain_timeout="20"))
    guest_client = EngineClient(run_directory, launch=None, owner_pid=os.getpid(), log=print)
    guest = type(owner)(guest_client, guest_client.start())
    generation = guest.submit("hello", max_tokens=400)
    wait_until(lambda: guest.num_running() == 1)
    closing = threading.Thread(target=owner.client.close)
    closing.start()
    wait_until(lambda: not owner.client._thread.is_alive())
    with pytest.raises(Overloaded, match=r"being ended|not loaded"):
        guest.finish(guest.submit("too late"))
    assert guest.finish(generation) == expected_text("hello", 400)
    closing.join(3.0)
    assert not closing.is_alive()
    owner.client.close = lambda: None
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


def test_run_directory_refuses_long_paths_and_foreign_parents(tmp_path):
    with pytest.raises(LoadFailed, match="TRIDENT_RUN_DIR"):
        RunDirectory(tmp_path / ("x" * 120))
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(LoadFailed, match="does not belong"):
        RunDirectory(link / "1-llm").create()


def test_stale_folders_are_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale, own = RunDirectory(tmp_path / f"{ended.pid}-llm"), RunDirectory(tmp_path / f"{os.getpid()}-llm")
    for folder in (stale, own):
        folder.create()
        folder.write_status(EngineStatus(state="ready", pid=1))
    own.remove_stale_siblings()
    assert not stale.path.exists()
    assert own.read_status() is not None
