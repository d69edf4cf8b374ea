"""All linear layers of SmolLM2-135M on a CPU, by format of the weights; results to load_tests/results/cpu_linear.jsonl.

    python load_tests/bench_cpu_linear.py

Every layer has weights of its own, so that they come from memory as in serving, and the head is among them up to 64
rows (a prompt needs one row of it). One thread, and its CPU time: other processes take turns with it and do not count.
Each run is the best of several passes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results_file import RESULTS, ResultsFile

from trident_llm.kernels import reference
from trident_llm.kernels.quantized_weight import Activations, QuantizedWeight

LAYER_SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
HEAD_SHAPE, NUM_LAYERS, MAX_HEAD_ROWS = (49152, 576), 30, 64
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)


@dataclass(frozen=True)
class Format:
    bits: int
    group_size: int | None
    activations: Activations = "none"


FORMATS: dict[str, Format | None] = {
    "bf16": None,
    "4-bit g64": Format(4, 64),
    "8-bit g64": Format(8, 64),
    "8-bit channel": Format(8, None),
    "W8A8 int8": Format(8, None, "int8"),
}


def make_weight(form: Format | None, shape: tuple[int, int]) -> Any:
    if form is None:
        return reference.pack_linear(torch.randn(shape, dtype=torch.bfloat16))
    groups = (shape[0], shape[1] // (form.group_size or shape[1]))
    weight = QuantizedWeight(
        codes=torch.randint(0, 2**form.bits, shape, dtype=torch.uint8),
        scales=torch.rand(groups).mul_(0.01).half(),
        zero_points=torch.full(groups, 2 ** (form.bits - 1), dtype=torch.uint8),
        bits=form.bits,
        group_size=form.group_size or shape[1],
        activations=form.activations,
    )
    return reference.pack_linear(weight)


def best_ms(weights: list[Any], shapes: list[tuple[int, int]], rows: int, passes: int) -> float:
    """Milliseconds to multiply ``rows`` rows with all of the weights."""
    inputs = {size: torch.randn(rows, size, dtype=torch.bfloat16) for _, size in shapes}
    times = []
    for _ in range(passes):
        begin = time.thread_time()
        for (_, size), weight in zip(shapes, weights, strict=True):
            reference.linear(inputs[size], weight)
        times.append(time.thread_time() - begin)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_linear.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"threads": 1, "layers": NUM_LAYERS, "passes": args.passes}
    for name, form in FORMATS.items():
        file = ResultsFile(
            path=args.out, benchmark="bench_cpu_linear", model="smollm2-135m", variant=name, settings=settings
        )
        shapes = [*LAYER_SHAPES * NUM_LAYERS, HEAD_SHAPE]
        weights = [make_weight(form, shape) for shape in shapes]
        file.record("weights", "MiB", [sum(weight.nbytes for weight in weights) / 2**20])
        for rows in ROWS:
            used = len(shapes) - (rows > MAX_HEAD_ROWS)
            runs = [best_ms(weights[:used], shapes[:used], rows, args.passes) for _ in range(args.runs)]
            file.record(f"rows_{rows}", "ms", runs)


if __name__ == "__main__":
    main()
