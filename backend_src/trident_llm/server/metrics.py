"""Publishes the engine's numbers as metrics of the Triton server: one door per engine does, from its own thread."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from ..errors import TridentError
from .engine_client import EngineClient

logger = logging.getLogger(__name__)

PUBLISH_INTERVAL = 0.25
"""Seconds. Every changed value costs a round trip to the server."""

GAUGES = {
    "running_requests": "Sequences that take part in the engine's steps",
    "waiting_requests": "Sequences that wait for their first step or to be resumed",
    "kv_blocks_total": "Blocks of the KV cache",
    "kv_blocks_used": "Blocks that sequences hold",
    "kv_blocks_cached": "Free blocks whose content the prefix cache can use again",
    "host_blocks_total": "Blocks of the host tier",
    "host_blocks_used": "Blocks of the host tier that hold a copy",
    "engine_ready": "1 while the engine process answers, else 0",
}
COUNTERS = {
    "kv_blocks_allocated_total": "Blocks that sequences took hold of, each shared one counted for each of them",
    "kv_blocks_freed_total": "Blocks that sequences gave back, counted likewise",
    "kv_blocks_evicted_total": "Free blocks whose cached content was overwritten",
    "prefix_cache_query_tokens_total": "Prompt tokens looked up in the prefix cache",
    "prefix_cache_hit_tokens_total": "Prompt tokens found in the prefix cache",
    "preemptions_total": "Sequences that gave up their blocks for others",
    "swapped_blocks_total": "Blocks copied to the host tier or back",
    "prompt_tokens_total": "Prompt tokens of requests that began to generate",
    "output_tokens_total": "Tokens generated",
    "engine_restarts_total": "Times the engine process ended unasked",
}


@dataclass
class _Counter:
    """A server counter that follows a total which starts at 0 with each engine process."""

    metric: Any
    offset: float = 0.0
    """What earlier engine processes had counted."""
    published: float = 0.0

    def publish(self, total: float) -> None:
        increment = self.offset + total - self.published
        if increment > 0:
            self.metric.increment(increment)
            self.published += increment


class MetricsPublisher:
    """Publishes while this door holds the watch over the engine."""

    def __init__(self, client: EngineClient, engine_name: str) -> None:
        self._client = client
        self._labels = {"engine": engine_name}
        self._families: list[Any] = []
        self._gauges: dict[str, Any] = {}
        self._counters: dict[str, _Counter] = {}
        self._last: dict[str, float] = {}
        self._epoch = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(PUBLISH_INTERVAL):
            if not self._client.is_watch_holder:
                continue
            try:
                if not self._gauges:
                    self._create()
                self._publish()
            except pb_utils.TritonModelException as error:
                logger.info("metrics are not published: %s", error)
                return

    def _create(self) -> None:
        for name, description in GAUGES.items():
            self._gauges[name] = self._metric(name, description, pb_utils.MetricFamily.GAUGE)
        for name, description in COUNTERS.items():
            metric = self._metric(name, description, pb_utils.MetricFamily.COUNTER)
            self._counters[name] = _Counter(metric, published=metric.value())

    def _metric(self, name: str, description: str, kind: Any) -> Any:
        family = pb_utils.MetricFamily(name=f"trident_{name}", description=description, kind=kind)
        self._families.append(family)
        return family.Metric(labels=self._labels)

    def _publish(self) -> None:
        values = self._engine_values()
        values["engine_ready"] = float(self._client.ready)
        values["engine_restarts_total"] = float(self._client.num_restarts)
        for name, value in values.items():
            if self._last.get(name) == value:
                continue
            if name in self._gauges:
                self._gauges[name].set(value)
            else:
                self._counters[name].publish(value)
            self._last[name] = value

    def _engine_values(self) -> dict[str, float]:
        """Gauges and totals of the engine; none while it does not answer."""
        try:
            stats = self._client.command("stats", {}, timeout=2.0)
        except TridentError:
            return {}
        if stats["epoch"] != self._epoch:
            self._follow(stats)
        return {name: float(stats[name]) for name in (*GAUGES, *COUNTERS) if name in stats}

    def _follow(self, stats: dict[str, Any]) -> None:
        """Another engine process, which begins at 0, or another publisher before this one: go on from its values."""
        for name, counter in self._counters.items():
            if name in stats:
                counter.offset = counter.published if self._epoch else max(counter.published - stats[name], 0.0)
        self._epoch = stats["epoch"]
