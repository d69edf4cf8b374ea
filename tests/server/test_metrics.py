"""Metrics of the server: who publishes them, until when, and that totals go on."""

from __future__ import annotations

import gc
import os
import signal
import time

import pytest

from tests.fakes import fake_backend_utils
from tests.fakes.engine_runs import engine_pid, fake_launch, wait_until
from tests.fakes.fake_backend_utils import Metric
from trident_llm.server import metrics
from trident_llm.server.engine_client import EngineClient


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, Metric]:
    """What the server shows, by name and labels."""
    monkeypatch.setattr(metrics, "PUBLISH_INTERVAL", 0.02)
    fake_backend_utils.MetricFamily.metrics.clear()
    return fake_backend_utils.MetricFamily.metrics


def test_adapters_have_counters_while_they_are_loaded(open_door, published):
    door = open_door()
    publisher = metrics.MetricsPublisher(door.client, "llm")

    def values() -> dict[str, float]:
        """Tokens by adapter."""
        name = "trident_adapter_generated_tokens_total{adapter="
        found = {key: metric.current for key, metric in list(published.items()) if key.startswith(name)}
        return {key.removeprefix(name).rstrip("}"): value for key, value in found.items()}

    def load(name: str) -> None:
        door.client.command("load_adapter", {"name": name})

    wait_until(lambda: values() == {"_other": 0})
    load("a")
    load("b")
    wait_until(lambda: values() == {"_other": 0, "a": 0, "b": 0})
    door.finish(door.submit("hello", max_tokens=7, adapter="a"))
    door.finish(door.submit("hello", max_tokens=5, adapter="gone"))
    wait_until(lambda: values() == {"_other": 5, "a": 7, "b": 0})
    assert published["trident_adapter_requests_total{adapter=a}"].current == 1
    door.client.command("unload_adapter", {"name": "a"})
    wait_until(lambda: values() == {"_other": 5, "b": 0})
    load("a")
    wait_until(lambda: values() == {"_other": 5, "a": 0, "b": 0})
    door.finish(door.submit("hello", max_tokens=3, adapter="a:0.5,b:0.5"))
    wait_until(lambda: values() == {"_other": 5, "a": 3, "b": 3})
    publisher.close()
    assert values() == {}
    door.finish(door.submit("hello", max_tokens=4, adapter="b"))
    successor = metrics.MetricsPublisher(door.client, "llm")
    wait_until(lambda: values() == {"_other": 5, "a": 3, "b": 7})
    door.finish(door.submit("hello", max_tokens=2, adapter="b"))
    wait_until(lambda: values() == {"_other": 5, "a": 3, "b": 9})
    time.sleep(0.1)
    assert values() == {"_other": 5, "a": 3, "b": 9}
    successor.close()


def test_metrics_go_on_counting_over_a_restart(open_door, run_directory, published):
    door = open_door()
    publisher = metrics.MetricsPublisher(door.client, "llm")

    def value(name: str) -> float:
        return published[f"trident_{name}"].current if f"trident_{name}" in published else -1.0

    door.finish(door.submit("hello", max_tokens=30))
    wait_until(lambda: value("output_tokens_total") == 30)
    assert value("engine_ready") == 1
    status = run_directory.read_status()
    assert status is not None
    os.kill(status.pid, signal.SIGKILL)
    wait_until(lambda: value("engine_restarts_total") == 1 and door.client.ready)
    door.finish(door.submit("hello", max_tokens=20))
    wait_until(lambda: value("output_tokens_total") == 50)
    publisher.close()
    successor = metrics.MetricsPublisher(door.client, "llm")
    wait_until(lambda: value("output_tokens_total") == 50)
    door.finish(door.submit("hello", max_tokens=7))
    wait_until(lambda: value("output_tokens_total") >= 57)
    time.sleep(0.1)
    assert value("output_tokens_total") == 57
    assert value("engine_restarts_total") == 1
    successor.close()


def test_no_family_outlives_the_watch(open_door, published, monkeypatch):
    families_at_release: list[int] = []
    gc.disable()
    try:
        door, other = open_door(), open_door()
        lock = door.client._watch._lock
        release = lock.release

        def record() -> None:
            families_at_release.append(fake_backend_utils.MetricFamily.num_alive)
            release()

        monkeypatch.setattr(lock, "release", record)
        first = metrics.MetricsPublisher(door.client, "llm")
        door.finish(door.submit("hello", max_tokens=9))
        wait_until(lambda: published.get("trident_output_tokens_total") == Metric(9))
        door.client._watch.stop()
        assert families_at_release == [0]
        assert not published
        second = metrics.MetricsPublisher(other.client, "llm")
        wait_until(lambda: published.get("trident_output_tokens_total") == Metric(9))
        first.close()
        door.client.close()
        del first
        assert published["trident_output_tokens_total"] == Metric(9)
        second.close()
        assert fake_backend_utils.MetricFamily.num_alive == 0
    finally:
        gc.enable()


def test_values_end_when_the_engine_does(open_door, run_directory, published):
    owner = open_door()
    guest = EngineClient(run_directory, launch=None, owner_pid=os.getpid(), log=print)
    guest.start()
    owner.client._watch.stop()
    publisher = metrics.MetricsPublisher(guest, "llm")
    wait_until(lambda: "trident_engine_ready" in published)
    owner.client.close()
    wait_until(lambda: not published, 2.0)
    publisher.close()
    guest.close()


def test_values_stay_while_the_engine_stays_down(open_door, run_directory, model_folder, published, monkeypatch):
    monkeypatch.setattr("trident_llm.server.engine_watch.LOCK_INTERVAL", 0.02)
    door = open_door(fake_launch(model_folder, max_engine_failures="1"))
    publisher = metrics.MetricsPublisher(door.client, "llm")
    wait_until(lambda: published.get("trident_engine_ready") == Metric(1))
    family = published["trident_engine_ready"]
    os.kill(engine_pid(run_directory), signal.SIGKILL)
    wait_until(lambda: family == Metric(0))
    time.sleep(0.3)
    assert published["trident_engine_ready"] is family
    publisher.close()
