"""When a door's requests are ended because its model goes away, and when they are left alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.fakes.engine_runs import wait_until
from trident_llm.errors import TridentError
from trident_llm.run_directory import RunDirectory
from trident_llm.server import unload_watch
from trident_llm.server.model_loads import ModelLoad
from trident_llm.server.unload_watch import UnloadWatch

DRAIN_TIMEOUT = 0.2
SEVERAL_LOOKS = 0.2


class Door:
    """A door with its watch. ``state`` is what the server says, ``num_running`` the requests that run."""

    def __init__(self, load: ModelLoad, num_running: int = 1, drain_timeout: float = DRAIN_TIMEOUT) -> None:
        self.drain_timeout = drain_timeout
        self.state = "READY"
        self.num_running = num_running
        self.num_asked = 0
        self.ended: list[str] = []
        self.released: list[float] = []
        self.watch = UnloadWatch(
            self,  # type: ignore[arg-type]
            load,
            ask_state=self._ask,
            num_running=lambda: self.num_running,
            release=self.released.append,
        )

    def end_all(self, error: TridentError) -> None:
        """Of the engine client: the requests get ``error``."""
        self.ended.append(str(error))
        self.num_running = 0

    def is_left_alone(self) -> bool:
        """For some looks."""
        time.sleep(DRAIN_TIMEOUT + SEVERAL_LOOKS)
        return not self.ended and not self.released

    def _ask(self) -> str:
        self.num_asked += 1
        if self.state == "broken":
            raise RuntimeError("ordered to break")
        return self.state


OpenDoor = Callable[..., Door]


@pytest.fixture
def load(run_directory: RunDirectory) -> ModelLoad:
    ModelLoad.begin(run_directory, "llm", "1")
    return ModelLoad(run_directory, "llm", "1")


@pytest.fixture
def open_door(load: ModelLoad, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenDoor]:
    monkeypatch.setattr(unload_watch, "ASK_INTERVAL", 0.02)
    doors: list[Door] = []

    def open_one(**fields: float) -> Door:
        doors.append(Door(load, **fields))
        return doors[-1]

    yield open_one
    for door in doors:
        door.watch.close()


@pytest.fixture
def reload(run_directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[ModelLoad]]:
    """Loads the model anew, with two doors."""

    def begin() -> list[ModelLoad]:
        ModelLoad.begin(run_directory, "llm", "1")
        loads = [ModelLoad(run_directory, "llm", "1") for _ in range(2)]
        for pid, load in enumerate(loads):
            monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
            load.show(2)
        return loads

    return begin


def test_requests_of_a_model_that_is_unloaded_get_drain_timeout(open_door: OpenDoor) -> None:
    door = open_door()
    wait_until(lambda: door.num_asked > 1)
    door.state = "UNLOADING"
    seconds = wait_until(lambda: bool(door.ended))
    assert DRAIN_TIMEOUT - 0.02 < seconds < DRAIN_TIMEOUT + 0.2
    assert door.ended == ["[UNAVAILABLE] the model is being unloaded; retry after 2 s"]
    wait_until(lambda: bool(door.released))
    time.sleep(SEVERAL_LOOKS)
    (drained_for,) = door.released
    assert DRAIN_TIMEOUT < drained_for < door.watch.drained_for < DRAIN_TIMEOUT + 1
    assert len(door.ended) == 1


def test_requests_that_end_in_time_are_not_disturbed(open_door: OpenDoor) -> None:
    door = open_door(drain_timeout=20.0)
    door.state = "UNLOADING"
    time.sleep(SEVERAL_LOOKS)
    assert not door.released
    door.num_running = 0
    wait_until(lambda: bool(door.released), 1.0)
    assert not door.ended


def test_a_request_that_comes_too_late_is_ended_as_well(open_door: OpenDoor) -> None:
    door = open_door(drain_timeout=0.0)
    door.state = "UNLOADING"
    wait_until(lambda: len(door.ended) == 1)
    door.num_running = 1
    wait_until(lambda: len(door.ended) == 2)


@pytest.mark.parametrize("state", ["READY", "", "LOADING", "UNAVAILABLE", "broken", "SOMETHING NEW"])
def test_nothing_but_being_unloaded_ends_requests(open_door: OpenDoor, state: str) -> None:
    door = open_door()
    door.state = state
    assert door.is_left_alone()
    assert door.num_asked > 2
    assert door.watch.drained_for == 0.0


@pytest.mark.parametrize("states", [("UNLOADING", "READY"), ("UNLOADING", ""), ("LOADING",), ("UNAVAILABLE",)])
def test_what_was_ready_and_is_not_goes_away_whatever_comes_after(
    open_door: OpenDoor, states: tuple[str, ...]
) -> None:
    door = open_door()
    for state in ("READY", *states):
        door.state = state
        asked = door.num_asked
        wait_until(lambda asked=asked: door.num_asked > asked + 1 or door.watch.drained_for > 0.0)
    wait_until(lambda: bool(door.ended))


def test_an_idle_door_does_not_ask(open_door: OpenDoor) -> None:
    door = open_door(num_running=0)
    door.state = "UNLOADING"
    assert door.is_left_alone()
    assert door.num_asked == 0


def test_an_idle_door_hears_it_from_others_of_its_load(open_door: OpenDoor) -> None:
    busy, idle = open_door(), open_door(num_running=0)
    busy.state = "UNLOADING"
    wait_until(lambda: bool(idle.released))
    assert idle.num_asked == 0
    assert not idle.ended


@pytest.mark.parametrize(("state", "is_told"), [("UNLOADING", True), ("READY", False), ("", False)])
def test_idle_doors_hear_it_from_the_first_that_is_taken_away(open_door: OpenDoor, state: str, is_told: bool) -> None:
    first, other = open_door(num_running=0), open_door(num_running=0)
    first.state = state
    first.watch.close()
    time.sleep(SEVERAL_LOOKS)
    assert bool(other.released) == is_told
    assert other.num_asked == 0


def test_requests_of_a_load_that_is_replaced_get_drain_timeout(open_door: OpenDoor, reload) -> None:
    door = open_door()
    wait_until(lambda: door.num_asked > 1)
    reload()
    seconds = wait_until(lambda: bool(door.ended))
    assert DRAIN_TIMEOUT < seconds < DRAIN_TIMEOUT + 0.3
    time.sleep(SEVERAL_LOOKS)
    assert not door.released
    assert door.watch.drained_for == 0.0


def test_a_load_that_fails_at_the_last_moment_replaces_nothing(open_door: OpenDoor, reload, monkeypatch) -> None:
    monkeypatch.setattr(unload_watch, "ASK_INTERVAL", 0.2)
    door = open_door(drain_timeout=0.0)
    wait_until(lambda: door.num_asked > 0)
    new = reload()
    wait_until(lambda: door.watch._looked_replaced)
    for load in new:
        load.leave()
    assert door.is_left_alone()
