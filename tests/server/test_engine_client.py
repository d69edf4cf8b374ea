"""Requests and commands of a door: round trips, cancellation, refusals."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from tests.fakes.engine_runs import engine_pid, fake_launch, wait_until
from tests.fakes.fake_engine import expected_text
from trident_llm.errors import Overloaded, TridentError


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


def test_all_that_runs_can_be_ended_with_an_error(open_door, model_folder):
    door = open_door(fake_launch(model_folder, step_time=0.5))
    other = open_door(fake_launch(model_folder, step_time=0.5))
    running = [door.submit("hello", max_tokens=4000) for _ in range(3)]
    others = other.submit("hello", max_tokens=4)
    wait_until(lambda: other.num_running() == 4)
    errors: list[str] = []

    def ask() -> None:
        try:
            door.client.command("stats", {})
        except TridentError as error:
            errors.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: bool(door.client._commands))
    door.client.end_all(Overloaded("enough; retry after 2 s"))
    asking.join(0.3)
    assert errors == ["[UNAVAILABLE] enough; retry after 2 s"]
    for generation in running:
        with pytest.raises(Overloaded, match="enough"):
            door.finish(generation, 0.0)
    assert other.finish(others) == expected_text("hello", 4)
    wait_until(lambda: other.num_running() == 0, 2.0)
    assert door.finish(door.submit("hello", max_tokens=2)) == expected_text("hello", 2)


def test_a_closed_client_refuses_and_closes_once(open_door):
    door, other = open_door(), open_door()
    running = door.submit("hello", max_tokens=4000)
    wait_until(lambda: other.num_running() == 1)
    door.client.close()
    door.client.close()
    assert running.full_output(0).finish_reason == "cancelled"
    for ask in (lambda: door.submit("late"), lambda: door.client.command("stats", {})):
        with pytest.raises(Overloaded, match="the model is being unloaded; retry after 2 s"):
            ask()
    door.client.end_all(Overloaded("too late"))
    door.client.events.refused(Overloaded("late"), "")
    wait_until(lambda: other.num_running() == 0, 1.0)
