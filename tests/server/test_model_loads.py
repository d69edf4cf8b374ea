"""Loads of a model that is loaded while it is loaded: which of them has been replaced."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from trident_llm.run_directory import RunDirectory
from trident_llm.server.model_loads import ModelLoad, num_instances


def config(*counts: int, **fields: Any) -> dict[str, Any]:
    groups = [{"count": count, "gpus": []} for count in counts]
    return {"instance_group": groups, "version_policy": {"latest": {"num_versions": 1}}, **fields}


@pytest.mark.parametrize(
    ("model_config", "number"),
    [
        (config(4), 4),
        (config(1, 2), 3),
        ({"instance_group": [{"count": 2, "gpus": [0, 1]}]}, 4),
        (config(4, version_policy={"specific": {"versions": [3]}}), 4),
        (config(4, version_policy={"latest": {"num_versions": 2}}), 0),
        (config(4, version_policy={"specific": {"versions": [1, 3]}}), 0),
        (config(4, version_policy={"all": {}}), 0),
        (config(4, model_warmup=[{"name": "first"}]), 0),
        ({}, 0),
    ],
)
def test_doors_of_a_load_are_known_unless_it_can_still_fail(model_config: dict[str, Any], number: int) -> None:
    assert num_instances(model_config) == number


class Loads:
    """Doors of one model, as the server makes them; each as if in a process of its own."""

    def __init__(self, run_directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
        self._run_directory = run_directory
        self._pids = iter(range(100, 200))
        self._monkeypatch = monkeypatch

    def begin(self, model: str = "llm", version: str = "1") -> None:
        ModelLoad.begin(self._run_directory, model, version)

    def door(self, num_doors: int, model: str = "llm", version: str = "1") -> ModelLoad:
        load = ModelLoad(self._run_directory, model, version)
        pid = next(self._pids)
        self._monkeypatch.setattr(os, "getpid", lambda: pid)
        load.show(num_doors)
        return load


@pytest.fixture
def loads(run_directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(run_directory, monkeypatch)


def test_a_load_is_replaced_when_all_doors_of_a_later_one_are_there(loads: Loads) -> None:
    loads.begin()
    old = [loads.door(2) for _ in range(2)]
    assert not any(door.is_replaced for door in old)
    loads.begin()
    assert not any(door.is_replaced for door in old)
    new = [loads.door(3), loads.door(3)]
    assert not any(door.is_replaced for door in old)
    new.append(loads.door(3))
    assert all(door.is_replaced for door in old)
    assert not any(door.is_replaced for door in new)


def test_a_load_that_failed_replaces_nothing(loads: Loads) -> None:
    loads.begin()
    old = loads.door(1)
    loads.begin()
    for door in [loads.door(4) for _ in range(3)]:
        door.leave()
    loads.begin()
    loads.door(4)
    assert not old.is_replaced


def test_doors_that_are_added_to_a_load_replace_nothing(loads: Loads) -> None:
    loads.begin()
    old = [loads.door(2) for _ in range(2)]
    added = [loads.door(4) for _ in range(2)]
    assert not any(door.is_replaced for door in (*old, *added))


def test_other_models_and_versions_replace_nothing(loads: Loads) -> None:
    loads.begin()
    old = loads.door(1)
    for model, version in (("llm", "2"), ("llm-1", "1"), ("../llm", "1")):
        loads.begin(model, version)
        loads.door(1, model, version)
    assert not old.is_replaced


def test_a_load_whose_begin_nobody_has_seen_is_left_alone(loads: Loads, run_directory: RunDirectory) -> None:
    run_directory.create()
    old = loads.door(1)
    old.mark_unloaded()
    loads.begin()
    loads.door(1)
    assert not old.is_replaced
    assert not old.is_unloaded


def test_all_doors_of_a_load_hear_that_it_is_unloaded_and_no_others(loads: Loads) -> None:
    loads.begin()
    doors = [loads.door(2) for _ in range(2)]
    loads.begin()
    later = loads.door(2)
    doors[0].mark_unloaded()
    assert [door.is_unloaded for door in (*doors, later)] == [True, True, False]


def test_what_is_gone_with_the_engine_is_not_made_again(loads: Loads, run_directory: RunDirectory) -> None:
    loads.begin()
    door = loads.door(1)
    run_directory.remove()
    door.mark_unloaded()
    door.show(1)
    door.leave()
    assert not door.is_unloaded
    assert not door.is_replaced
    assert not run_directory.path.exists()


def test_what_is_left_from_before_a_reboot_replaces_nothing(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: 10**18)
    loads.begin()
    left = loads.door(1)
    left.mark_unloaded()
    monkeypatch.undo()
    loads.begin()
    door = loads.door(1)
    assert not door.is_replaced
    assert not door.is_unloaded
    assert left.is_replaced
