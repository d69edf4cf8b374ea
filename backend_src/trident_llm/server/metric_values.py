"""What the engine's answer to ``metrics`` comes to as values of metrics. Knows nothing of how they are published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..metrics_catalog import ENGINE_COUNTERS, ENGINE_GAUGES, HISTOGRAMS, QUANTIZATION_METHODS, MetricSpec


def engine_values(stats: Mapping[str, Any]) -> dict[str, float]:
    """By the keys of the published series, and of each adapter that is followed. What ``stats`` lacks is left out."""
    figures = {**stats, **_renamed(stats)}
    values: dict[str, float] = {}
    for spec in (*ENGINE_GAUGES, *ENGINE_COUNTERS):
        figure = figures.get(spec.name)
        if spec.label:
            values.update({spec.key(label): float(value) for label, value in (figure or {}).items()})
        elif figure is not None:
            values[spec.name] = float(figure)
    for spec in HISTOGRAMS:
        values.update(_histogram_values(spec, stats["histograms"][spec.name]))
    return values


def bounds(spec: MetricSpec) -> tuple[str, ...]:
    """Of a histogram's buckets, as the label ``le`` has them."""
    return (*(f"{bound:g}" for bound in spec.buckets), "+Inf")


def _renamed(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Figures that metrics have under other names, or by label."""
    memory, quantization = stats.get("memory") or {}, stats.get("quantization") or {}
    usage, jobs = stats.get("adapter_usage") or {}, stats.get("requantize_jobs") or {}
    num_blocks, method = stats.get("kv_blocks_total"), stats.get("isq_method")
    return {
        "num_requests_running": stats.get("running_requests"),
        "num_requests_waiting": stats.get("waiting_requests"),
        "num_preemptions_total": stats.get("preemptions_total"),
        "generation_tokens_total": stats.get("output_tokens_total"),
        "gpu_cache_usage_perc": stats["kv_blocks_used"] / num_blocks if num_blocks else None,
        "kv_cache_bytes": memory.get("kv_cache_bytes"),
        "adapter_slots_bytes": memory.get("adapter_slot_bytes"),
        "adapter_requests_total": {name: used["requests"] for name, used in usage.items()},
        "adapter_generated_tokens_total": {name: used["generated_tokens"] for name, used in usage.items()},
        "weights_bytes": memory.get("weights_bytes_after"),
        "weights_bytes_unquantized": memory.get("weights_bytes_before"),
        "quantized_bits": quantization.get("average_bits", 0.0),
        "quantization_method": {name: name == method for name in QUANTIZATION_METHODS} if method else None,
        "requantize_jobs_running": jobs.get("running"),
        "requantize_jobs_total": {state: number for state, number in jobs.items() if state != "running"},
    }


def _histogram_values(spec: MetricSpec, histogram: Mapping[str, Any]) -> dict[str, float]:
    """Cumulative counts, the largest first: a scrape between two increments sees none above the next bucket's."""
    count = float(sum(histogram["counts"]))
    values = {f"{spec.name}.count": count, f"{spec.name}.sum": float(histogram["sum"])}
    for bound, beyond in zip(reversed(bounds(spec)), (0, *reversed(histogram["counts"])), strict=False):
        count -= beyond
        values[f"{spec.name}.{bound}"] = count
    return values
