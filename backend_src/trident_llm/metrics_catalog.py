"""Every metric of this project: name, kind, unit and meaning, and the buckets of histograms.

The one list that the engine counts by, the server publishes and the documentation shows. Knows neither of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .config import EngineConfig

PREFIX = "trident_"

SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""From the first token of a short prompt on a GPU to that of a full queue on a CPU."""
LONG_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0)
STEP_SECONDS = (0.002, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5)
STEP_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
"""From one stream to a step of prompts alone."""
SAMPLES = (1.0, 2.0, 5.0, 10.0, 20.0)

Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True)
class MetricSpec:
    """``name`` is without the prefix. With a ``label`` there is one value for each of ``label_values``, and with the
    label ``adapter`` one for each name that is followed, besides."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    buckets: tuple[float, ...] = ()
    """Upper bounds, each included; what is beyond the last falls into the bucket ``+Inf``."""
    label: str = ""
    label_values: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    @property
    def series(self) -> dict[str, dict[str, str]]:
        """Labels of each value of a gauge or counter, by the key under which ``stats`` or a door's board has it."""
        if not self.label:
            return {self.name: {}}
        return {self.key(value): {self.label: value} for value in self.label_values}

    def key(self, label_value: str) -> str:
        """The key of one value."""
        return f"{self.name}.{label_value}"


FINISH_REASONS = ("stop", "length", "cancelled", "error")
REFUSAL_CODES = ("INVALID_ARG", "NOT_FOUND", "UNAVAILABLE", "INTERNAL")
JOB_ENDS = ("done", "failed")
QUANTIZATION_METHODS: tuple[str, ...] = EngineConfig.__dataclass_fields__["isq_method"].metadata["choices"]
MAX_ADAPTERS = 64
"""Adapters and mixes that have values of their own, so that no number of them can flood a Prometheus."""
OTHER_ADAPTERS = "_other"
"""The label of all others. No adapter's name begins with an underscore."""

ENGINE_GAUGES = (
    MetricSpec("running_requests", "gauge", "sequences", "Sequences that take part in the engine's steps"),
    MetricSpec(
        "waiting_requests", "gauge", "sequences", "Sequences that wait for their first step or to be resumed"
    ),
    MetricSpec("num_requests_running", "gauge", "sequences", "trident_running_requests, under vLLM's name"),
    MetricSpec("num_requests_waiting", "gauge", "sequences", "trident_waiting_requests, under vLLM's name"),
    MetricSpec("queue_places", "gauge", "sequences", "Sequences that are still taken before requests are refused"),
    MetricSpec("kv_blocks_total", "gauge", "blocks", "Blocks of the KV cache"),
    MetricSpec("kv_blocks_used", "gauge", "blocks", "Blocks that sequences hold"),
    MetricSpec("gpu_cache_usage_perc", "gauge", "0 to 1", "Share of the KV cache's blocks that sequences hold"),
    MetricSpec("kv_blocks_cached", "gauge", "blocks", "Free blocks whose content the prefix cache can use again"),
    MetricSpec("host_blocks_total", "gauge", "blocks", "Blocks of the host tier"),
    MetricSpec("host_blocks_used", "gauge", "blocks", "Blocks of the host tier that hold a copy"),
    MetricSpec("adapters_loaded", "gauge", "adapters", "LoRA adapters that requests can name"),
    MetricSpec("mixes_loaded", "gauge", "mixes", "X-LoRA mixes that requests can name"),
    MetricSpec("adapter_slots_total", "gauge", "slots", "Places for adapters on the device"),
    MetricSpec("adapter_slots_used", "gauge", "slots", "Places on the device that hold an adapter"),
    MetricSpec("adapter_slots_bytes", "gauge", "bytes", "Memory of the places for adapters on the device"),
    MetricSpec("weights_bytes", "gauge", "bytes", "Memory of the weights, quantized ones as they are packed"),
    MetricSpec("weights_bytes_unquantized", "gauge", "bytes", "Memory that the weights would take unquantized"),
    MetricSpec(
        "quantization_method",
        "gauge",
        "0 or 1",
        "1 for the isq_method in force, 0 for all others",
        label="method",
        label_values=QUANTIZATION_METHODS,
    ),
    MetricSpec(
        "quantized_bits", "gauge", "bits", "Bits per weight of decoder layers, scales included; 0 without isq_method"
    ),
    MetricSpec("requantize_jobs_running", "gauge", "jobs", "Jobs that are giving the model other weights"),
    MetricSpec("kv_cache_bytes", "gauge", "bytes", "Memory of the KV cache"),
)
SERVER_GAUGES = (
    MetricSpec("engine_ready", "gauge", "0 or 1", "1 while the engine process answers, else 0"),
    MetricSpec("doors", "gauge", "processes", "Door processes that are connected to the engine"),
    MetricSpec("door_requests", "gauge", "requests", "Requests that the doors have accepted and not ended"),
)
ENGINE_COUNTERS = (
    MetricSpec(
        "kv_blocks_allocated_total",
        "counter",
        "blocks",
        "Blocks that sequences took hold of, each shared one counted for each of them",
    ),
    MetricSpec("kv_blocks_freed_total", "counter", "blocks", "Blocks that sequences gave back, counted likewise"),
    MetricSpec("kv_blocks_evicted_total", "counter", "blocks", "Free blocks whose cached content was overwritten"),
    MetricSpec(
        "prefix_cache_query_tokens_total", "counter", "tokens", "Prompt tokens looked up in the prefix cache"
    ),
    MetricSpec("prefix_cache_hit_tokens_total", "counter", "tokens", "Prompt tokens found in the prefix cache"),
    MetricSpec("preemptions_total", "counter", "sequences", "Sequences that gave up their blocks for others"),
    MetricSpec("num_preemptions_total", "counter", "sequences", "trident_preemptions_total, under vLLM's name"),
    MetricSpec("swapped_blocks_total", "counter", "blocks", "Blocks copied to the host tier or back"),
    MetricSpec("prompt_tokens_total", "counter", "tokens", "Prompt tokens of requests that began to generate"),
    MetricSpec("output_tokens_total", "counter", "tokens", "Tokens generated"),
    MetricSpec("generation_tokens_total", "counter", "tokens", "Tokens generated, under vllm_backend's name"),
    MetricSpec("steps_total", "counter", "steps", "Steps of the engine"),
    MetricSpec("step_seconds_total", "counter", "seconds", "Time that the engine spent in its steps"),
    MetricSpec("adapter_slot_loads_total", "counter", "adapters", "Adapters copied to the device"),
    MetricSpec("adapter_reads_total", "counter", "adapters", "Adapters read from disk"),
    MetricSpec(
        "adapter_requests_total",
        "counter",
        "requests",
        "Requests that took an adapter or a mix, by its name; one with a blend counts for each of its adapters",
        label="adapter",
        label_values=(OTHER_ADAPTERS,),
    ),
    MetricSpec(
        "adapter_generated_tokens_total",
        "counter",
        "tokens",
        "Tokens generated with an adapter or a mix, counted likewise",
        label="adapter",
        label_values=(OTHER_ADAPTERS,),
    ),
    MetricSpec(
        "requantize_jobs_total",
        "counter",
        "jobs",
        "Jobs of requantize and calibrate that have ended, by how",
        label="state",
        label_values=JOB_ENDS,
    ),
)
SERVER_COUNTERS = (
    MetricSpec("engine_restarts_total", "counter", "restarts", "Times the engine process ended unasked"),
    MetricSpec("requests_accepted_total", "counter", "requests", "Requests that the doors passed on to the engine"),
    MetricSpec(
        "requests_finished_total",
        "counter",
        "requests",
        "Accepted requests that have ended, by the reason of the sample that ended least well",
        label="reason",
        label_values=FINISH_REASONS,
    ),
    MetricSpec(
        "requests_refused_total",
        "counter",
        "requests",
        "Requests that a door answered with an error at once, by its code",
        label="code",
        label_values=REFUSAL_CODES,
    ),
    MetricSpec(
        "requests_resubmitted_total", "counter", "requests", "Times a door submitted an unfinished request again"
    ),
    MetricSpec("door_responses_total", "counter", "responses", "Responses that the doors sent, each with any tokens"),
)
HISTOGRAMS = (
    MetricSpec(
        "time_to_first_token_seconds", "histogram", "seconds", "From a request's arrival to its first token", SECONDS
    ),
    MetricSpec(
        "time_per_output_token_seconds", "histogram", "seconds", "Between two tokens of a sequence", STEP_SECONDS
    ),
    MetricSpec(
        "e2e_request_latency_seconds",
        "histogram",
        "seconds",
        "From a request's arrival to its last token",
        LONG_SECONDS,
    ),
    MetricSpec("request_queue_time_seconds", "histogram", "seconds", "Wait for a sequence's first step", SECONDS),
    MetricSpec(
        "request_prefill_time_seconds", "histogram", "seconds", "From the first step to the first token", SECONDS
    ),
    MetricSpec(
        "request_decode_time_seconds", "histogram", "seconds", "From the first token to the last", LONG_SECONDS
    ),
    MetricSpec(
        "request_inference_time_seconds", "histogram", "seconds", "From the first step to the last token", LONG_SECONDS
    ),
    MetricSpec("request_prompt_tokens", "histogram", "tokens", "Prompt tokens of a finished sequence", TOKENS),
    MetricSpec("request_generation_tokens", "histogram", "tokens", "Tokens generated for a finished sequence", TOKENS),
    MetricSpec(
        "iteration_tokens_total", "histogram", "tokens", "Tokens of a step, of prompts and output together", STEP_TOKENS
    ),
    MetricSpec("request_params_n", "histogram", "samples", "The request option n", SAMPLES),
)

METRICS = (*ENGINE_GAUGES, *SERVER_GAUGES, *ENGINE_COUNTERS, *SERVER_COUNTERS, *HISTOGRAMS)


def published_names(spec: MetricSpec) -> tuple[str, ...]:
    """The families under which the server shows a metric: three for a histogram, in Prometheus's own shape."""
    if spec.kind != "histogram":
        return (spec.full_name,)
    return tuple(f"{spec.full_name}_{part}" for part in ("bucket", "sum", "count"))
