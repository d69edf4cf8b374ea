"""The numbers of a finished load run, from the files of its folder."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load_records import RUN, SERVER, RequestRecord, read_requests, read_tokens
from profiles import EVENTS


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Events of one name, in milliseconds."""

    count: int
    p50: float
    p95: float
    p99: float
    longest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        p50, p95, p99 = (quantile(ordered, share) for share in (0.5, 0.95, 0.99))
        return cls(count=len(ordered), p50=p50, p95=p95, p99=p99, longest=ordered[-1])


@dataclass(frozen=True, kw_only=True)
class Summary:
    """``spreads`` and ``requests`` by kind of user; a failed request counts there, but its times do not."""

    profile: str
    seconds: float
    """With all users running."""
    requests: dict[str, int]
    failures: dict[str, int]
    errors: dict[str, int]
    """How often each text came."""
    spreads: dict[str, dict[str, Spread]]
    output_tokens: int
    """That clients got, in all."""
    engine_output_tokens: int
    """That the engine generated, in all: more where clients left."""
    output_tok_s: float
    """That clients got while all users ran."""
    engine_output_tok_s: float
    """That the engine generated in that time, also for clients that had left."""
    kv_peak_share: float
    running_peak: int
    waiting_peak: int
    preemptions: int
    prefix_hit_share: float
    """Of the prompt tokens looked up in the prefix cache."""
    engine_restarts: int
    held: dict[str, int]
    """What the engine still held when all had ended: empty if nothing."""
    cores: dict[str, float]
    """CPU cores in use on average, by kind of process; of the server's only if it was the run's own."""


def quantile(ordered: Sequence[float], share: float) -> float:
    """The nearest rank."""
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def summarize(folder: Path) -> Summary:
    """Raises ``OSError`` or ``ValueError`` when the folder is not that of a finished run."""
    run = json.loads((folder / RUN).read_text())
    requests, stats = read_requests(folder), read_stats(folder)
    tokens = read_tokens(folder)
    began, ended = run["all_started"], run["ended"]
    whole = range(math.ceil(began), math.floor(ended))  # seconds in which all users ran from beginning to end
    return Summary(
        profile=run["profile"],
        seconds=ended - began,
        requests=dict(Counter(record.kind for record in requests)),
        failures=dict(Counter(record.kind for record in requests if record.error)),
        errors=dict(Counter(f"{record.kind}: {record.error}" for record in requests if record.error).most_common()),
        spreads=_spreads(requests),
        output_tokens=sum(tokens.values()),
        output_tok_s=sum(tokens.get(second, 0) for second in whole) / max(len(whole), 1),
        held=run["held"],
        cores=run["cores"],
        **_engine(stats, began, ended),
    )


def read_stats(folder: Path) -> list[dict[str, float]]:
    """Lines of the engine's statistics, without those that the server did not answer."""
    with (folder / SERVER).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row.values())]
    return [{name: float(value) for name, value in row.items()} for row in rows]


def _spreads(requests: Iterable[RequestRecord]) -> dict[str, dict[str, Spread]]:
    values: dict[str, dict[str, list[float]]] = {}
    for record in requests:
        for event in EVENTS if not record.error else ():
            value = getattr(record, event)
            if value is not None:
                values.setdefault(record.kind, {}).setdefault(event, []).append(value)
    return {kind: {event: Spread.of(found) for event, found in events.items()} for kind, events in values.items()}


def _engine(stats: Sequence[dict[str, float]], began: float, ended: float) -> dict[str, Any]:
    """What the engine's statistics say; its speed is that between the first and the last look while all users ran."""
    first, last = stats[0], stats[-1]
    steady = [line for line in stats if began <= line["time"] <= ended] or [first, last]
    seconds = steady[-1]["time"] - steady[0]["time"]
    generated = steady[-1]["output_tokens_total"] - steady[0]["output_tokens_total"]
    asked = last["prefix_cache_query_tokens_total"] - first["prefix_cache_query_tokens_total"]
    found = last["prefix_cache_hit_tokens_total"] - first["prefix_cache_hit_tokens_total"]
    return {
        "engine_output_tokens": int(last["output_tokens_total"] - first["output_tokens_total"]),
        "engine_output_tok_s": generated / seconds if seconds else 0.0,
        "kv_peak_share": max(line["kv_blocks_used"] / line["kv_blocks_total"] for line in stats),
        "running_peak": int(max(line["running_requests"] for line in stats)),
        "waiting_peak": int(max(line["waiting_requests"] for line in stats)),
        "preemptions": int(last["preemptions_total"] - first["preemptions_total"]),
        "prefix_hit_share": found / asked if asked else 0.0,
        "engine_restarts": int(last["engine_restarts"] - first["engine_restarts"]),
    }
