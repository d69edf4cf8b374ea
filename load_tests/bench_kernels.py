"""Speed of the Triton-language kernels at the shapes of Mistral-7B; results to load_tests/results/kernels.jsonl.

    python load_tests/bench_kernels.py [--out FILE]

Rates are held against what plain kernels reach on the same GPU: reading 4 GiB, and a bf16 matrix product of size 8192.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_timing import graph_times, matmul_rate, read_bandwidth
from kernel_problems import LINEAR_SHAPES, Decode, Launch, Prefill
from results_file import RESULTS, commit, device_name, versions

from trident_llm.kernels.decode_attention import choose_num_splits
from trident_llm.kernels.layer_cache import LayerCache
from trident_llm.kernels.prefill_attention_hopper import DEFAULT_CONFIG, takes
from trident_llm.kernels.sample_tokens import SamplingTensors, allocate_workspace, sample_tokens
from trident_llm.kernels.token_logprobs import token_logprobs
from trident_llm.kernels.triton_language import AttentionPlan, TritonLanguageKernels

_FEW_ROWS = (1, 2, 4, 8, 16, 32, 64)
_MANY_ROWS = (256, 320, 384, 448, 512, 640, 704, 768, 832, 1024, 1280, 1536, 1792, 2048)
NUM_LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 32, 4096, 14336, 32, 8, 128


@dataclass(frozen=True)
class Ceilings:
    read_gb_s: float
    bf16_tflop_s: float


class Results:
    """Appends to ``path`` and prints a table row for each measurement."""

    def __init__(self, path: Path, ceilings: Ceilings) -> None:
        self.path = path
        self.ceilings = ceilings
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def record(
        self, kernel: str, shape: str, runs_ms: Sequence[float], *, num_bytes: float = 0, flops: float = 0
    ) -> None:
        ms = statistics.median(runs_ms)
        row = [f"{kernel:<38}{shape:<32}{ms * 1e3:10.2f} us"]
        self._write(kernel, shape, "us", ms * 1e3, runs_ms)
        if num_bytes:
            rate = num_bytes / ms / 1e6
            row.append(f"{rate:8.0f} GB/s {100 * rate / self.ceilings.read_gb_s:5.1f}%")
            self._write(kernel, shape, "gb_s", rate, runs_ms)
        if flops:
            rate = flops / ms / 1e9
            row.append(f"{rate:8.0f} TFLOP/s {100 * rate / self.ceilings.bf16_tflop_s:5.1f}%")
            self._write(kernel, shape, "tflop_s", rate, runs_ms)
        print(" ".join(row), flush=True)

    def ceiling(self, name: str, metric: str, value: float) -> None:
        self._write(name, "ceiling", metric, value, [])
        print(f"{name:<70}{value:10.0f} {metric}", flush=True)

    def _write(self, kernel: str, shape: str, metric: str, value: float, runs_ms: Sequence[float]) -> None:
        line: dict[str, Any] = {
            "benchmark": "bench_kernels",
            "device": device_name(),
            "kernel": kernel,
            "shape": shape,
            "metric": metric,
            "value": round(value, 3),
            "runs_us": [round(run * 1e3, 3) for run in runs_ms],
            "ceilings": vars(self.ceilings),
            "versions": versions(),
            "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def bench_attention(results: Results) -> None:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for num_seqs, context in ((64, 2048), (1, 384), (1, 2048), (1, 32768), (16, 2048), (64, 384), (256, 384)):
        decode = Decode(num_seqs, context)
        decode.prepare("cuda")
        splits = choose_num_splits(num_seqs, KV_HEADS, context, processors)
        shape = f"{num_seqs} x {context}, {splits} splits"
        times = graph_times(decode.launches(None, splits))
        results.record("decode_attention", shape, times, num_bytes=decode.num_bytes)
    for tokens, heads, head_dim in ((128, (32, 8), 128), (2048, (32, 8), 128), (8192, (32, 8), 128),
                                    (8192, (32, 8), 64), (4096, (16, 8), 256)):  # fmt: skip
        prefill = Prefill(tokens, heads, head_dim)
        prefill.prepare("cuda")
        shape = f"{tokens} tokens, head_dim {head_dim}"
        results.record("prefill_attention", shape, graph_times(prefill.launches(None)), flops=prefill.flops)
        if torch.cuda.get_device_capability()[0] == 9 and takes(prefill.q, LayerCache(prefill.cache), None, None):
            times = graph_times(prefill.launches(DEFAULT_CONFIG, num_processors=processors))
            results.record("prefill_attention_hopper", shape, times, flops=prefill.flops)


def bench_elementwise(results: Results, kernels: TritonLanguageKernels) -> None:
    for rows in (1, 64, 8192):
        _bench_elementwise(results, kernels, rows, copies=8 if rows > 64 else 32)


def _bench_elementwise(results: Results, kernels: TritonLanguageKernels, rows: int, copies: int) -> None:
    def random(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(rows, *shape, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]

    weight = torch.randn(HIDDEN, dtype=torch.bfloat16, device="cuda")
    x, residual = random(HIDDEN), random(HIDDEN)
    shape, size = f"{rows} x {HIDDEN}", rows * HIDDEN * 2
    times = graph_times([lambda a=a: kernels.rms_norm(a, weight, 1e-5) for a in x])
    results.record("rms_norm", shape, times, num_bytes=2 * size)
    pairs = list(zip(x, residual, strict=True))
    times = graph_times([lambda a=a, r=r: kernels.fused_add_rms_norm(a, r, weight, 1e-5) for a, r in pairs])
    results.record("fused_add_rms_norm", shape, times, num_bytes=4 * size)
    times = graph_times([lambda g=g: kernels.silu_and_mul(g) for g in random(2 * INTERMEDIATE)])
    results.record("silu_and_mul", f"{rows} x {INTERMEDIATE}", times, num_bytes=3 * rows * INTERMEDIATE * 2)
    cos = random(1, HEAD_DIM)[0]
    cache = new_cache(rows // 16 + 1)
    plan = decode_plan(rows, 16)
    qkv = random(HEADS + 2 * KV_HEADS, HEAD_DIM)
    times = graph_times([lambda t=t: kernels.rotary_embed_and_store_kv(t, cos, cos, cache, plan) for t in qkv])
    moved = rows * HEAD_DIM * 2 * (2 * (HEADS + KV_HEADS) + 3 * KV_HEADS)
    results.record("rotary_embed_and_store_kv", f"{rows} tokens", times, num_bytes=moved)


def new_cache(num_blocks: int) -> LayerCache:
    return LayerCache(torch.zeros(num_blocks, 16, 2, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda"))


def decode_plan(num_seqs: int, context: int) -> AttentionPlan:
    blocks = -(-context // 16)
    tables = torch.arange(num_seqs * blocks, dtype=torch.int32, device="cuda").view(num_seqs, blocks)
    return AttentionPlan(
        slots=torch.arange(num_seqs, device="cuda"),
        block_tables=tables,
        cu_seqlens_q=torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda"),
        context_lens=torch.full((num_seqs,), context, dtype=torch.int32, device="cuda"),
        seq_counts=torch.full((2,), num_seqs, dtype=torch.int32, device="cuda"),
        num_decodes=num_seqs,
        num_prefills=0,
        max_context=blocks * 16,
        sliding_window=None,
    )


def bench_stack(results: Results, kernels: TritonLanguageKernels) -> None:
    """All linear layers of the model in one graph, alone and with everything else that a decode step runs."""
    def weight(name: str) -> torch.Tensor:
        return torch.randn(*LINEAR_SHAPES[name], dtype=torch.bfloat16, device="cuda") * 0.02

    names = ("qkv", "o", "gate_up", "down")
    layers = [{name: weight(name) for name in names} for _ in range(NUM_LAYERS)]
    head = weight("head")
    num_bytes = 2 * (head.numel() + NUM_LAYERS * sum(layers[0][name].numel() for name in names))
    for rows in (*_FEW_ROWS, *_MANY_ROWS):
        inputs = {n: torch.randn(rows, n, dtype=torch.bfloat16, device="cuda") for n in (HIDDEN, INTERMEDIATE)}
        kinds = {"cuBLAS": torch.nn.functional.linear, "ours": kernels.linear}
        if rows in _MANY_ROWS:
            del kinds["ours"]  # which is cuBLAS there
        for kind, linear in kinds.items():
            def step(linear: Any = linear, inputs: Any = inputs) -> None:
                for layer in layers:
                    for matrix in layer.values():
                        linear(inputs[matrix.shape[1]], matrix)
                linear(inputs[HIDDEN], head)

            # A weight of two bytes takes two operations a row.
            flops = rows * num_bytes if rows in _MANY_ROWS else 0
            times = graph_times([step], 5)
            results.record(f"linear stack, {kind}", f"{rows} rows", times, num_bytes=num_bytes, flops=flops)
    for rows, context in ((1, 384), (4, 384), (16, 384), (64, 384), (256, 384)):
        step = decode_step(kernels, layers, head, rows, context)
        results.record("whole decode step", f"{rows} x {context}", graph_times([step], 5), num_bytes=num_bytes)


def decode_step(
    kernels: TritonLanguageKernels, layers: list[dict[str, torch.Tensor]], head: torch.Tensor, rows: int, context: int
) -> Launch:
    """One token of each of ``rows`` sequences through all layers, the head and the greedy choice."""
    norm = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")
    embedded = torch.randn(rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
    cos = torch.rand(rows, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    plan = decode_plan(rows, context)
    blocks = plan.block_tables.numel()
    caches = [new_cache(blocks) for _ in layers]
    params, workspace = sampling_tensors(rows, temperature=0.0), sample_space(rows)
    token_ids = torch.zeros_like(plan.slots)

    def step() -> None:
        residual = embedded.clone()
        hidden = kernels.rms_norm(residual, norm, 1e-5)
        for layer, cache in zip(layers, caches, strict=True):
            qkv = kernels.linear(hidden, layer["qkv"]).view(rows, -1, HEAD_DIM)
            kernels.rotary_embed_and_store_kv(qkv, cos, cos, cache, plan)
            attended = kernels.paged_attention(qkv[:, :HEADS], cache, plan, HEAD_DIM**-0.5)
            hidden = kernels.linear_add_rms_norm(attended, layer["o"], None, residual, norm, 1e-5)
            hidden = kernels.linear_silu_and_mul(hidden, layer["gate_up"])
            hidden = kernels.linear_add_rms_norm(hidden, layer["down"], None, residual, norm, 1e-5)
        sample_tokens(kernels.linear(hidden, head), params, token_ids, workspace, greedy=True)

    return step


def sampling_tensors(rows: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> SamplingTensors:
    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device="cuda")

    index = torch.arange(rows, device="cuda")
    return SamplingTensors(
        full(temperature, torch.float32), full(top_k, torch.int32), full(top_p, torch.float32),
        full(0.0, torch.float32), index, index, index,
    )  # fmt: skip


def sample_space(rows: int) -> torch.Tensor:
    return allocate_workspace(rows, torch.device("cuda"))


def bench_sampling(results: Results) -> None:
    for rows, vocab in ((1, 32000), (64, 32000), (256, 32000), (1, 128256), (64, 128256)):
        _bench_sampling(results, rows, vocab)


def _bench_sampling(results: Results, rows: int, vocab: int) -> None:
    cases: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0}, "temperature": {}, "top_k 50": {"top_k": 50}, "top_p 0.9": {"top_p": 0.9},
        "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    }  # fmt: skip
    logits = [torch.randn(rows, vocab, device="cuda") * 3 for _ in range(8)]
    token_ids, workspace = torch.zeros(rows, dtype=torch.int64, device="cuda"), sample_space(rows)
    for name, options in cases.items():
        params, greedy = sampling_tensors(rows, **options), name == "greedy"

        def launch(x: torch.Tensor, params: SamplingTensors = params, greedy: bool = greedy) -> None:
            sample_tokens(x, params, token_ids, workspace, greedy=greedy)

        times = graph_times([partial(launch, x) for x in logits])
        results.record(f"sample_tokens, {name}", f"{rows} x {vocab}", times)
    times = graph_times([partial(token_logprobs, x, token_ids, 0) for x in logits])
    results.record("token_logprobs", f"{rows} x {vocab}", times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.jsonl")
    options = parser.parse_args()
    torch.manual_seed(0)
    ceilings = Ceilings(read_bandwidth(), matmul_rate())
    results = Results(options.out, ceilings)
    results.ceiling("reading 4 GiB", "gb_s", ceilings.read_gb_s)
    results.ceiling("bf16 matrix product, size 8192", "tflop_s", ceilings.bf16_tflop_s)
    kernels = TritonLanguageKernels.for_device(torch.device("cuda"))
    for bench in (bench_attention, bench_sampling):
        bench(results)
    for layered in (bench_elementwise, bench_stack):
        layered(results, kernels)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
