"""Publishes the engine's numbers as metrics of the Triton server: one door per engine does, from its own thread.

Histograms are published as the counters that Prometheus makes of them, so that whatever an interval has brought costs
one round trip per bucket: the server's own histograms cost one per observation.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from ..door_board import read_doors
from ..errors import TridentError
from ..metrics_catalog import (
    ENGINE_COUNTERS,
    ENGINE_GAUGES,
    HISTOGRAMS,
    PREFIX,
    SERVER_COUNTERS,
    SERVER_GAUGES,
    MetricSpec,
)
from .engine_client import EngineClient

logger = logging.getLogger(__name__)

PUBLISH_INTERVAL = 0.25
"""Seconds. Every changed value costs a round trip to the server."""


@dataclass
class _Counter:
    """A server counter that follows a total, which begins at 0 again with another engine process."""

    metric: Any
    published: float
    offset: float = 0.0
    """What had been published when the total began at 0."""
    last: float = 0.0

    def follow(self, total: float, *, is_first: bool) -> None:
        """Go on from ``total``, of another engine process, or (``is_first``) of one that others published before."""
        self.offset = max(self.published - total, 0.0) if is_first else self.published
        self.last = 0.0

    def publish(self, total: float) -> None:
        if total < self.last:
            self.offset = self.published
        self.last = total
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
        for spec in (*ENGINE_GAUGES, *SERVER_GAUGES):
            self._gauges |= self._metrics(spec.name, spec.meaning, pb_utils.MetricFamily.GAUGE, spec.series)
        for spec in (*ENGINE_COUNTERS, *SERVER_COUNTERS):
            self._create_counters(spec.name, spec.meaning, spec.series)
        for spec in HISTOGRAMS:
            buckets = {f"{spec.name}.{bound}": {"le": bound} for bound in _bounds(spec)}
            self._create_counters(f"{spec.name}_count", f"{spec.meaning}: how many", {f"{spec.name}.count": {}})
            self._create_counters(f"{spec.name}_sum", f"{spec.meaning}: their sum", {f"{spec.name}.sum": {}})
            self._create_counters(f"{spec.name}_bucket", f"{spec.meaning}: how many up to le", buckets)
        first = {**read_doors(self._client.doors_folder), "engine_restarts_total": self._client.num_restarts}
        for name, counter in self._counters.items():
            counter.follow(first.get(name, 0.0), is_first=True)

    def _create_counters(self, name: str, description: str, series: Mapping[str, dict[str, str]]) -> None:
        for key, metric in self._metrics(name, description, pb_utils.MetricFamily.COUNTER, series).items():
            self._counters[key] = _Counter(metric, metric.value())

    def _metrics(
        self, name: str, description: str, kind: Any, series: Mapping[str, dict[str, str]]
    ) -> dict[str, Any]:
        family = pb_utils.MetricFamily(name=PREFIX + name, description=description, kind=kind)
        self._families.append(family)
        return {key: family.Metric(labels={**self._labels, **labels}) for key, labels in series.items()}

    def _publish(self) -> None:
        values = self._engine_values()
        values.update(read_doors(self._client.doors_folder))
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
            stats = self._client.command("metrics", {}, timeout=2.0)
        except TridentError:
            return {}
        values = engine_values(stats)
        if stats["epoch"] != self._epoch:
            for name in values.keys() & self._counters.keys():
                self._counters[name].follow(values[name], is_first=not self._epoch)
            self._epoch = stats["epoch"]
        return values


def engine_values(stats: Mapping[str, Any]) -> dict[str, float]:
    """What the engine's answer to ``metrics`` says, by the keys of the published series."""
    memory, quantization = stats.get("memory") or {}, stats.get("quantization") or {}
    renamed = {
        "generation_tokens_total": stats.get("output_tokens_total"),
        "weights_bytes": memory.get("weights_bytes_after"),
        "weights_bytes_unquantized": memory.get("weights_bytes_before"),
        "kv_cache_bytes": memory.get("kv_cache_bytes"),
        "quantized_bits": quantization.get("average_bits", 0.0),
    }
    found = {spec.name: stats.get(spec.name) for spec in (*ENGINE_GAUGES, *ENGINE_COUNTERS)} | renamed
    values = {name: float(value) for name, value in found.items() if value is not None}
    for spec in HISTOGRAMS:
        values.update(_histogram_values(spec, stats["histograms"][spec.name]))
    return values


def _histogram_values(spec: MetricSpec, histogram: Mapping[str, Any]) -> dict[str, float]:
    """Cumulative counts, the largest first: a scrape between two increments sees none above the next bucket's."""
    count = float(sum(histogram["counts"]))
    values = {f"{spec.name}.count": count, f"{spec.name}.sum": float(histogram["sum"])}
    for bound, beyond in zip(reversed(_bounds(spec)), (0, *reversed(histogram["counts"])), strict=False):
        count -= beyond
        values[f"{spec.name}.{bound}"] = count
    return values


def _bounds(spec: MetricSpec) -> tuple[str, ...]:
    return (*(f"{bound:g}" for bound in spec.buckets), "+Inf")
