"""Publishes the engine's numbers as metrics of the Triton server: one door per engine does, from its own thread.

Histograms are published as the counters that Prometheus makes of them, so that whatever an interval has brought costs
one round trip per bucket: the server's own histograms cost one per observation.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from ..door_board import read_doors
from ..errors import TridentError
from ..metrics_catalog import (
    ENGINE_COUNTERS,
    ENGINE_GAUGES,
    HISTOGRAMS,
    OTHER_ADAPTERS,
    PREFIX,
    SERVER_COUNTERS,
    SERVER_GAUGES,
)
from .engine_client import EngineClient
from .metric_values import bounds, engine_values

logger = logging.getLogger(__name__)

PUBLISH_INTERVAL = 0.25
"""Seconds. Every changed value costs a round trip to the server."""
_ADAPTER_COUNTERS = tuple(spec for spec in ENGINE_COUNTERS if spec.label == "adapter")


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
    """Publishes while this door holds the watch over the engine.

    Values end with the family objects that made them, whoever else publishes under their names: so these are gone
    before another door can hold the watch, and it goes on from the totals that were published.
    """

    def __init__(self, client: EngineClient, engine_name: str) -> None:
        self._client = client
        self._labels = {"engine": engine_name}
        self._lock = threading.Lock()
        """Guards everything below that the server knows of."""
        self._families: list[Any] = []
        self._gauges: dict[str, Any] = {}
        self._counters: dict[str, _Counter] = {}
        self._adapters: dict[str, list[Any]] = {}
        """Families by adapter, each with one value: the server takes a value away with its whole family only."""
        self._handed_over: dict[str, float] = {}
        """Totals that the publisher before had reached, by counter, until the first values are published."""
        self._last: dict[str, float] = {}
        self._epoch = ""
        client.before_watch_release(self._withdraw)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take all values away."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing.wait(PUBLISH_INTERVAL):
                if self._client.is_watch_holder:
                    stats = self._ask_engine()
                    with self._lock:
                        self._publish(stats)
        except pb_utils.TritonModelException as error:
            logger.info("metrics are not published: %s", error)
        self._withdraw()

    def _ask_engine(self) -> dict[str, Any] | None:
        """None while the engine does not answer."""
        try:
            return self._client.command("metrics", {}, timeout=2.0)
        except TridentError:
            return None

    def _withdraw(self) -> None:
        """Delete every family object, and leave the totals for who publishes next."""
        with self._lock:
            if not self._families:
                return
            if self._client.run_directory.exists():
                totals = {key: counter.published for key, counter in self._counters.items()}
                self._client.run_directory.write_published({**self._handed_over, **totals})
            # A metric goes before its family. Nothing else refers to either, so all end here and by this thread.
            self._gauges.clear()
            self._counters.clear()
            self._adapters.clear()
            self._families.clear()
            self._last.clear()
            self._epoch = ""

    def _create(self) -> None:
        self._handed_over = self._client.run_directory.take_published()
        for spec in (*ENGINE_GAUGES, *SERVER_GAUGES):
            self._gauges |= self._metrics(spec.name, spec.meaning, pb_utils.MetricFamily.GAUGE, spec.series)
        for spec in (*ENGINE_COUNTERS, *SERVER_COUNTERS):
            self._create_counters(spec.name, spec.meaning, spec.series)
        for spec in HISTOGRAMS:
            buckets = {f"{spec.name}.{bound}": {"le": bound} for bound in bounds(spec)}
            self._create_counters(f"{spec.name}_count", f"{spec.meaning}: how many", {f"{spec.name}.count": {}})
            self._create_counters(f"{spec.name}_sum", f"{spec.meaning}: their sum", {f"{spec.name}.sum": {}})
            self._create_counters(f"{spec.name}_bucket", f"{spec.meaning}: how many up to le", buckets)
        first = {**read_doors(self._client.doors_folder), "engine_restarts_total": self._client.num_restarts}
        for name, counter in self._counters.items():
            counter.follow(first.get(name, 0.0), is_first=True)

    def _create_counters(self, name: str, description: str, series: Mapping[str, dict[str, str]]) -> None:
        for key, metric in self._metrics(name, description, pb_utils.MetricFamily.COUNTER, series).items():
            self._counters[key] = self._counter(key, metric)

    def _counter(self, key: str, metric: Any) -> _Counter:
        """Goes on where a publisher before has ended, or was killed: then its values are still there."""
        published = metric.value()
        missing = self._handed_over.get(key, 0.0) - published
        if missing > 0:
            metric.increment(missing)
            published += missing
        return _Counter(metric, published)

    def _metrics(
        self, name: str, description: str, kind: Any, series: Mapping[str, dict[str, str]]
    ) -> dict[str, Any]:
        family = pb_utils.MetricFamily(name=PREFIX + name, description=description, kind=kind)
        self._families.append(family)
        return {key: self._metric(family, labels) for key, labels in series.items()}

    def _metric(self, family: Any, labels: Mapping[str, str]) -> Any:
        return family.Metric(labels={**self._labels, **labels})

    def _publish(self, stats: Mapping[str, Any] | None) -> None:
        """``stats``: the engine's answer to ``metrics``; None: it gave none."""
        if not self._client.is_watch_holder:
            return
        if not self._families:
            self._create()
        values = {} if stats is None else self._engine_values(stats)
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

    def _engine_values(self, stats: Mapping[str, Any]) -> dict[str, float]:
        """Gauges and totals of the engine."""
        values = engine_values(stats)
        if stats["epoch"] != self._epoch:
            for name in values.keys() & self._counters.keys():
                self._counters[name].follow(values[name], is_first=not self._epoch)
            self._epoch = stats["epoch"]
        self._follow_adapters(stats.get("adapter_usage", {}).keys() - {OTHER_ADAPTERS}, values)
        self._handed_over.clear()
        return values

    def _follow_adapters(self, names: Set[str], values: Mapping[str, float]) -> None:
        """Create the counters of new names, and end those of names that are gone."""
        for name in self._adapters.keys() - names:
            for spec in _ADAPTER_COUNTERS:
                del self._counters[spec.key(name)]
                self._last.pop(spec.key(name), None)
            del self._adapters[name]
        kind = pb_utils.MetricFamily.COUNTER
        for name in names - self._adapters.keys():
            families = [pb_utils.MetricFamily(spec.full_name, spec.meaning, kind) for spec in _ADAPTER_COUNTERS]
            self._adapters[name] = families
            for spec, family in zip(_ADAPTER_COUNTERS, families, strict=True):
                metric = self._metric(family, {spec.label: name})
                counter = self._counters[spec.key(name)] = self._counter(spec.key(name), metric)
                counter.follow(values[spec.key(name)], is_first=True)
