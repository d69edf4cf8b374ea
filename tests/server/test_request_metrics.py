"""Histograms of requests: each time and length lands in its bucket, once."""

from __future__ import annotations

import pytest

from trident_llm.engine.adapter_usage import AdapterUsages
from trident_llm.engine.request_metrics import Histogram, RequestMetrics
from trident_llm.engine.sequence import Sequence
from trident_llm.metrics_catalog import (
    HISTOGRAMS,
    MAX_ADAPTERS,
    METRICS,
    OTHER_ADAPTERS,
    STEP_TOKENS,
    published_names,
)
from trident_llm.protocol import SamplingParams
from trident_llm.server.metric_values import engine_values


def sequence(*output_ids: int) -> Sequence:
    params = SamplingParams(seed=0, max_tokens=8)
    seq = Sequence("a", 0, [1, 2, 3, *output_ids], 3, params, max_total_tokens=11, stop_ids=frozenset())
    seq.arrival_time, seq.requested_at, seq.started_at = 100.1, 100.0, 100.3
    return seq


def give(metrics: RequestMetrics, seq: Sequence, *times: float) -> None:
    for now in times:
        metrics.token(seq, now)
        seq.token_ids.append(9)
        metrics.end_step(now, 1)


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
        "iteration_tokens_total": (3, 3),
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
    theirs = {
        "counter": "prompt_tokens_total generation_tokens_total num_preemptions_total",
        "gauge": "num_requests_running num_requests_waiting gpu_cache_usage_perc",
        "histogram": """time_to_first_token_seconds time_per_output_token_seconds e2e_request_latency_seconds
        request_prompt_tokens request_generation_tokens request_params_n iteration_tokens_total
        request_queue_time_seconds request_inference_time_seconds request_prefill_time_seconds
        request_decode_time_seconds""",
    }
    kinds = {spec.name: spec.kind for spec in METRICS}
    for kind, names in theirs.items():
        assert {kinds.get(name) for name in names.split()} == {kind}


def test_figures_under_other_names_are_the_same_figures():
    stats = {
        "histograms": RequestMetrics().to_dict(), "running_requests": 3, "waiting_requests": 2, "preemptions_total": 7,
        "kv_blocks_total": 200, "kv_blocks_used": 50, "isq_method": "awq", "memory": {"adapter_slot_bytes": 64},
        "requantize_jobs": {"running": 1, "done": 4, "failed": 2},
        "adapter_usage": {
            "a.b": {"requests": 5, "generated_tokens": 90}, "_other": {"requests": 0, "generated_tokens": 1},
        },
    }  # fmt: skip
    values = engine_values(stats)
    assert values["num_requests_running"] == values["running_requests"] == 3
    assert values["num_requests_waiting"] == values["waiting_requests"] == 2
    assert values["num_preemptions_total"] == values["preemptions_total"] == 7
    assert values["gpu_cache_usage_perc"] == 0.25 and values["adapter_slots_bytes"] == 64
    methods = {key: value for key, value in values.items() if key.startswith("quantization_method.")}
    assert methods.pop("quantization_method.awq") == 1 and len(methods) == 5 and set(methods.values()) == {0}
    assert (values["requantize_jobs_running"], values["requantize_jobs_total.done"]) == (1, 4)
    assert values["requantize_jobs_total.failed"] == 2
    assert (values["adapter_requests_total.a.b"], values["adapter_generated_tokens_total.a.b"]) == (5, 90)
    assert values["adapter_generated_tokens_total._other"] == 1


def test_what_a_step_computes_fits_its_buckets():
    metrics = RequestMetrics()
    for num_tokens in (1, 2, 256, 16384):
        metrics.end_step(100.0, num_tokens)
    found = metrics.to_dict()["iteration_tokens_total"]
    assert found["sum"] == 1 + 2 + 256 + 16384 and found["counts"][-1] == 0
    assert [bound for bound, count in zip(STEP_TOKENS, found["counts"], strict=False) if count] == [1, 8, 256, 16384]


def test_adapters_are_counted_by_name():
    metrics, seq, plain = RequestMetrics(), sequence(), sequence()
    metrics.adapters.keep(["mix", "a", "b"])
    seq.usages = metrics.adapters.of("a@1:0.5,b@2:0.5")
    metrics.added(1, seq.usages)
    metrics.added(2, metrics.adapters.of("mix@7"))
    give(metrics, seq, 100.5, 100.7)
    give(metrics, plain, 100.5)
    expected = {"mix": (1, 0), "a": (1, 2), "b": (1, 2), OTHER_ADAPTERS: (0, 0)}
    assert {name: tuple(used.values()) for name, used in metrics.adapters.to_dict().items()} == expected
    metrics.clear()
    assert {name: tuple(used.values()) for name, used in metrics.adapters.to_dict().items()} == dict.fromkeys(
        expected, (0, 0)
    )


def test_so_many_adapters_have_names_of_their_own():
    usages = AdapterUsages(limit=2)
    assert AdapterUsages()._limit == MAX_ADAPTERS
    usages.keep(["a", "b", "c", "d"])
    assert list(usages.to_dict()) == ["a", "b", OTHER_ADAPTERS]
    (of_others,) = usages.of("c@1:0.5,d@1:0.5")
    of_others.requests += 1
    (of_b,) = usages.of("b")
    of_b.requests += 5
    usages.keep(["b", "c", "d"])
    assert list(usages.to_dict()) == ["b", "c", OTHER_ADAPTERS]
    assert usages.of("b") == (of_b,) and usages.of("d") == (of_others,) != usages.of("c")
    usages.keep([])
    assert usages.to_dict() == {OTHER_ADAPTERS: {"requests": 1, "generated_tokens": 0}}
    assert usages.of("b") == (of_others,)
