"""Histograms of requests: each time and length lands in its bucket, once."""

from __future__ import annotations

import pytest

from trident_llm.engine.request_metrics import Histogram, RequestMetrics
from trident_llm.engine.sequence import Sequence
from trident_llm.metrics_catalog import HISTOGRAMS, METRICS, published_names
from trident_llm.protocol import SamplingParams
from trident_llm.server.metrics import engine_values


def sequence(*output_ids: int) -> Sequence:
    params = SamplingParams(seed=0, max_tokens=8)
    seq = Sequence("a", 0, [1, 2, 3, *output_ids], 3, params, max_total_tokens=11, stop_ids=frozenset())
    seq.arrival_time, seq.requested_at, seq.started_at = 100.1, 100.0, 100.3
    return seq


def give(metrics: RequestMetrics, seq: Sequence, *times: float) -> None:
    for now in times:
        metrics.token(seq, now)
        seq.token_ids.append(9)
        metrics.end_step(now)


def sums(metrics: RequestMetrics) -> dict[str, tuple[int, float]]:
    """How many, and their sum, of each histogram that has any."""
    found = {name: (sum(h["counts"]), h["sum"]) for name, h in metrics.to_dict().items()}
    return {name: (count, pytest.approx(total)) for name, (count, total) in found.items() if count}


def test_a_bucket_includes_its_bound():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)
    histogram.observe(1.25, times=4)
    assert (histogram.counts, histogram.sum) == ([2, 6, 1], 13.0)


def test_times_of_a_sequence():
    metrics, seq = RequestMetrics(), sequence()
    metrics.added(2)
    give(metrics, seq, 100.5, 100.7, 101.5)
    metrics.finished(seq)
    assert sums(metrics) == {
        "request_params_n": (1, 2),
        "time_to_first_token_seconds": (1, 0.5),
        "request_queue_time_seconds": (1, 0.2),
        "request_prefill_time_seconds": (1, 0.2),
        "time_per_output_token_seconds": (2, 1.0),
        "e2e_request_latency_seconds": (1, 1.5),
        "request_decode_time_seconds": (1, 1.0),
        "request_inference_time_seconds": (1, 1.2),
        "request_prompt_tokens": (1, 3),
        "request_generation_tokens": (1, 3),
    }
    metrics.clear()
    assert sums(metrics) == {}


def test_a_sequence_that_goes_on_elsewhere_has_one_first_token():
    metrics, seq = RequestMetrics(), sequence(7, 7)
    give(metrics, seq, 101.0, 101.5)
    metrics.finished(seq)
    assert "time_to_first_token_seconds" not in sums(metrics)
    assert sums(metrics)["time_per_output_token_seconds"] == (1, 0.5)
    assert sums(metrics)["e2e_request_latency_seconds"] == (1, 1.5)
    assert sums(metrics)["request_generation_tokens"] == (1, 4)


def test_published_buckets_are_cumulative():
    metrics, seq = RequestMetrics(), sequence()
    give(metrics, seq, 100.5, 100.69, 101.5)
    values = engine_values({"histograms": metrics.to_dict(), "output_tokens_total": 3})
    name = "time_per_output_token_seconds"
    keys = [key for key in values if key.startswith(f"{name}.") and not key.endswith((".count", ".sum"))]
    assert keys[:4] == [f"{name}.{bound}" for bound in ("+Inf", "2.5", "1", "0.5")]
    expected = {key: (bound >= 0.2) + (bound >= 1) for key in keys if (bound := float(key.split(".", 1)[1]))}
    assert {key: values[key] for key in keys} == expected
    assert values["generation_tokens_total"] == values["output_tokens_total"] == 3


def test_names_and_buckets_fit_prometheus():
    names = [name for spec in METRICS for name in published_names(spec)]
    assert len(names) == len(set(names))
    for spec in METRICS:
        assert spec.kind != "counter" or spec.name.endswith("_total")
        assert bool(spec.buckets) == (spec.kind == "histogram")
    for spec in HISTOGRAMS:
        assert list(spec.buckets) == sorted(set(spec.buckets))


def test_tokens_and_times_have_vllm_backends_names():
    theirs = """prompt_tokens_total generation_tokens_total time_to_first_token_seconds time_per_output_token_seconds
    e2e_request_latency_seconds request_prompt_tokens request_generation_tokens request_params_n"""
    assert set(theirs.split()) <= {spec.name for spec in METRICS}
