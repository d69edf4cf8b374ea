"""Engines that die or hang: restarts that cost no token, requests that are to blame, and who watches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.fakes.engine_runs import ROOT, engine_pid, fake_launch, wait_until
from tests.fakes.fake_engine import expected_text
from trident_llm.deaths import Deaths
from trident_llm.errors import EngineFailed, Overloaded


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


def test_an_engine_that_stays_down_is_started_with_the_next_load(open_door, run_directory, model_folder):
    door = open_door(fake_launch(model_folder, max_engine_failures="1"))
    os.kill(engine_pid(run_directory), signal.SIGKILL)
    wait_until(lambda: (status := run_directory.read_status()) is not None and run_directory.is_final(status))
    again = open_door(fake_launch(model_folder, max_engine_failures="1"))
    assert again.finish(again.submit("hello", max_tokens=9)) == expected_text("hello", 9)
    wait_until(lambda: door.client.ready)
    assert door.finish(door.submit("hello", max_tokens=9)) == expected_text("hello", 9)
