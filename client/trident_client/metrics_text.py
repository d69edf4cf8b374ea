"""Reads Prometheus's text format, as far as the Triton server writes it, and what ``trident top`` computes from it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass
class Scrape:
    """One look at ``/metrics``, at ``time`` of the monotonic clock. Values of equal names are summed over labels."""

    time: float
    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    buckets: dict[str, dict[float, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    """Cumulative counts by upper bound, of each histogram."""
    adapters: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    """Values with the label ``adapter``, by that and by name."""


def parse_metrics(text: str, time: float) -> Scrape:
    """The metrics of this project in ``text``, without their prefix."""
    scrape = Scrape(time)
    for name, labels, value in _samples(text):
        if name.endswith("_bucket") and "le" in labels:
            scrape.buckets[name.removesuffix("_bucket")][float(labels["le"])] += value
            continue
        scrape.values[name] += value
        if "adapter" in labels:
            scrape.adapters[labels["adapter"]][name] += value
    return scrape


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for line in text.splitlines():
        match = _LINE.match(line)
        if match and match["name"].startswith("trident_"):
            labels = dict(_LABEL.findall(match["labels"] or ""))
            yield match["name"].removeprefix("trident_"), labels, float(match["value"])


def quantile(share: float, buckets: Mapping[float, float]) -> float | None:
    """The value below which ``share`` of the observations lie, as PromQL's ``histogram_quantile`` has it: evenly spread
    within a bucket; beyond the last bound, that bound. None without observations."""
    bounds = sorted(buckets)
    if not bounds or buckets[bounds[-1]] <= 0:
        return None
    wanted = share * buckets[bounds[-1]]
    below_bound = below = 0.0
    for bound in bounds:
        if buckets[bound] >= wanted and buckets[bound] > below:
            if bound == float("inf"):
                return below_bound
            return below_bound + (bound - below_bound) * (wanted - below) / (buckets[bound] - below)
        below_bound, below = bound, buckets[bound]
    return below_bound


def since(before: Mapping[float, float], now: Mapping[float, float]) -> dict[float, float]:
    """Buckets of the observations between two scrapes."""
    return {bound: count - before.get(bound, 0.0) for bound, count in now.items()}
