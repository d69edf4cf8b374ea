"""Times the configurations among which the kernels' constants were chosen; one JSON object a line.

    python load_tests/tune_kernels.py --out FILE [--only NAME ...]

Kernels are first compiled on all cores, without the GPU; then each configuration is checked against float32 and timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_timing import graph_ms, matmul_rate, read_bandwidth
from kernel_problems import LINEAR_SHAPES, Decode, Linear, Prefill, QuantizedLinear
from lora_problem import Lora
from row_problems import NormRows, SiluRows

from trident_llm.kernels import quantized_matmul, scaled_matmul, skinny_matmul
from trident_llm.kernels.decode_attention import DecodeConfig
from trident_llm.kernels.lora import LoraConfig
from trident_llm.kernels.matmul_hopper import HopperProductConfig
from trident_llm.kernels.matrix_vector import MatrixVectorConfig
from trident_llm.kernels.prefill_attention import PrefillConfig
from trident_llm.kernels.prefill_attention_hopper import HopperConfig
from trident_llm.kernels.quantized_matmul import QuantizedConfig
from trident_llm.kernels.quantized_matmul_hopper import HopperMatmulConfig
from trident_llm.kernels.quantized_vector import VectorConfig
from trident_llm.kernels.rms_norm import NormConfig
from trident_llm.kernels.scaled_matmul_hopper import HopperScaledConfig
from trident_llm.kernels.silu_and_quantize import SiluConfig
from trident_llm.kernels.skinny_matmul import SkinnyConfig

_MAX_ERROR = 1e-2


@dataclass(frozen=True)
class Candidate:
    """How ``problem.launches`` is called."""

    name: str
    problem: Any
    arguments: tuple[Any, ...]


def candidates() -> Iterator[Candidate]:
    """Candidates of one problem follow each other."""
    yield from _prefill()
    yield from _hopper_prefill()
    yield from _decode()
    yield from _matrix_vector()
    yield from _skinny()
    yield from _hopper()
    yield from _quantized()
    yield from _hopper_quantized()
    yield from _scaled()
    yield from _hopper_scaled()
    yield from _rows()
    yield from _lora()


def _prefill() -> Iterator[Candidate]:
    wide = [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 7), (64, 128, 4, 2),
            (64, 64, 4, 2), (128, 64, 4, 2), (128, 128, 4, 2), (256, 64, 8, 2), (256, 32, 8, 3), (128, 32, 4, 3),
            (64, 64, 4, 3), (128, 256, 8, 2)]  # fmt: skip
    deep = [(128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 5)]
    problems = [
        (Prefill(8192), wide),
        (Prefill(2048), wide),
        (Prefill(128), wide),
        (Prefill(8192, (32, 8), 64), [*wide[:7], (256, 64, 8, 5), (128, 128, 4, 5), (128, 64, 4, 5)]),
        (Prefill(4096, (16, 8), 256), deep),
    ]
    for problem, configs in problems:
        for config in configs:
            yield Candidate("prefill", problem, (PrefillConfig(*config),))


def _hopper_prefill() -> Iterator[Candidate]:
    """For devices of compute capability 9.0. Keys of a tile, and so many tiles of K and V in shared memory."""
    for tokens in (128, 512, 2048, 8192):
        problem = Prefill(tokens, (32, 8), 128)
        for tile_keys, num_stages in ((128, 2), (64, 4), (64, 2), (128, 1)):
            for persistent in (True, False):
                config = HopperConfig(tile_keys, num_stages, persistent)
                yield Candidate("hopper_prefill", problem, (config,))


def _decode() -> Iterator[Candidate]:
    configs = [(64, 4, 3), (64, 4, 2), (64, 4, 5), (64, 2, 3), (32, 4, 3), (32, 4, 5), (32, 2, 3), (32, 2, 5),
               (64, 8, 3), (128, 4, 2), (128, 4, 3), (128, 8, 3), (16, 1, 5), (32, 1, 3), (32, 1, 5)]  # fmt: skip
    for (num_seqs, context), choices in _DECODES.items():
        problem = Decode(num_seqs, context)
        for splits, config in itertools.product(choices, configs):
            yield Candidate("decode", problem, (DecodeConfig(*config), splits))


_DECODES = {
    (64, 2048): (1, 2), (64, 256): (1, 2), (256, 256): (1,), (256, 384): (1,), (1, 256): (8, 16, 64),
    (1, 2048): (16, 64), (16, 2048): (2, 4), (16, 256): (2, 4),
}  # fmt: skip
"""Splits to try for sequences of some context."""


def _matrix_vector() -> Iterator[Candidate]:
    short = [(2, 2048, 8), (1, 4096, 8), (1, 2048, 8), (1, 2048, 4), (2, 4096, 8), (2, 4096, 16), (4, 2048, 8)]
    long = [(1, 16384, 16), (1, 8192, 8), (1, 4096, 8), (1, 2048, 4), (2, 2048, 8), (2, 4096, 8), (2, 2048, 4)]
    for rows, name in itertools.product((1, 2), LINEAR_SHAPES):
        problem = Linear(name, rows)
        for config in long if LINEAR_SHAPES[name][1] > 8192 else short:
            yield Candidate("matrix_vector", problem, ("matrix_vector", MatrixVectorConfig(*config)))
        if name == "gate_up":
            for config in short:
                problem = Linear(name, rows, silu=True)
                yield Candidate("matrix_vector", problem, ("matrix_vector", MatrixVectorConfig(*config)))


def _skinny() -> Iterator[Candidate]:
    whole = [(64, 128, 4, 4, 0), (64, 128, 4, 6, 0), (64, 128, 4, 5, 512), (64, 64, 4, 8, 0), (64, 64, 4, 10, 0),
             (64, 256, 4, 3, 0), (128, 64, 4, 5, 0), (128, 64, 8, 5, 0), (128, 128, 8, 3, 0), (128, 128, 8, 4, 0),
             (64, 128, 4, 3, 1024), (32, 128, 4, 6, 0)]  # fmt: skip
    split = [(64, 128, 4, 4, 512, 2), (64, 128, 4, 4, 512, 4), (64, 128, 4, 3, 512, 4), (64, 128, 4, 5, 0, 4),
             (64, 128, 4, 4, 512, 8), (64, 64, 4, 5, 512, 4), (128, 64, 4, 5, 0, 4), (128, 128, 8, 3, 0, 4),
             (64, 128, 4, 3, 1024, 2), (64, 128, 4, 5, 512, 3), (128, 64, 8, 4, 256, 4)]  # fmt: skip
    silu = [(32, 128, 4, 4, 0), (64, 64, 4, 5, 0), (64, 64, 4, 4, 256), (64, 128, 4, 3, 0), (64, 128, 4, 2, 512),
            (64, 64, 4, 6, 0), (64, 64, 8, 5, 0), (128, 64, 8, 4, 0), (128, 64, 8, 3, 0)]  # fmt: skip
    for rows, name in itertools.product((8, 16, 32, 64, 96, 128), LINEAR_SHAPES):
        problem = Linear(name, rows)
        yield Candidate("linear", problem, ("cublas", None))
        for config in whole if name in ("gate_up", "head") else whole + split:
            yield Candidate("skinny", problem, ("skinny", SkinnyConfig(*config)))
        if name == "gate_up":
            fused = Linear(name, rows, silu=True)
            for config in silu:
                yield Candidate("skinny", fused, ("skinny", SkinnyConfig(*config)))


def _hopper() -> Iterator[Candidate]:
    """For devices of compute capability 9.0, beside what all devices have."""
    for rows, name in itertools.product(_HOPPER_PRODUCTS, LINEAR_SHAPES):
        for silu in (False, True) if name == "gate_up" else (False,):
            problem = Linear(name, rows, silu=silu)
            if (name == "head" and rows > 64) or (name == "gate_up" and not silu and rows <= 64):
                continue
            if not silu:
                yield Candidate("hopper", problem, ("cublas", None))
            few = name in ("o", "down")
            if rows <= skinny_matmul.MAX_ROWS:
                num_outputs = LINEAR_SHAPES[name][0] // (2 if silu else 1)
                plain = skinny_matmul.default_config(rows, num_outputs, silu_and_mul=silu, may_split=few)
                yield Candidate("hopper", problem, ("skinny", plain))
            for groups, panels, tile_rows, stages in _HOPPER_PRODUCTS[rows]:
                if silu and panels == 1:
                    continue
                parts = {1: (1, 2), 2: (4,), 4: (4, 8)}[groups * panels] if few and rows <= 128 else (1, 2, 4)
                for splits in parts if few and rows <= 512 else (1,):
                    config = HopperProductConfig(groups, panels, tile_rows, stages, splits)
                    yield Candidate("hopper", problem, ("hopper", config))


_HOPPER_PRODUCTS = {
    8: [(1, 1, 16, 20), (1, 1, 16, 10), (1, 2, 16, 11), (1, 2, 16, 5), (1, 4, 16, 6), (1, 4, 16, 3)],
    32: [(1, 1, 32, 16), (1, 1, 32, 8), (1, 2, 32, 10), (1, 2, 32, 5), (1, 4, 32, 5), (1, 4, 32, 3)],
    64: [(1, 1, 64, 12), (1, 1, 64, 6), (1, 2, 64, 8), (1, 2, 64, 4), (1, 4, 64, 5), (2, 2, 64, 5)],
    128: [(1, 1, 128, 8), (1, 2, 128, 6), (1, 2, 128, 3), (2, 1, 128, 6), (2, 2, 128, 4)],
    256: [(2, 2, 128, 4), (2, 1, 256, 4), (2, 1, 128, 6)],
    512: [(2, 2, 128, 4), (2, 1, 256, 4)],
    2048: [(2, 2, 128, 4), (2, 1, 256, 4)],
}
"""By rows: groups, panels, rows of a tile and stages."""


def _quantized() -> Iterator[Candidate]:
    """Of the vector kernel outputs, warps, depth; of the other outputs, words, warps, stages, splits."""
    vectors = {4096: [(16, 4, 4), (16, 2, 4), (16, 2, 8), (32, 2, 4), (32, 2, 2), (16, 1, 8), (32, 1, 4), (16, 4, 2)],
               14336: [(16, 4, 7), (16, 4, 4), (16, 2, 7), (16, 2, 4), (32, 2, 4), (32, 4, 3)]}  # fmt: skip
    tiles = [(64, 32, 4, 3), (64, 32, 4, 4), (128, 32, 4, 3), (128, 32, 8, 3), (256, 32, 8, 3)]
    for name, rows in itertools.product(LINEAR_SHAPES, (1, 8, 16, 64, 128, 256)):
        for silu in (False, True) if name == "gate_up" else (False,):
            problem = QuantizedLinear(name, rows, silu=silu)
            if rows <= 16:
                for config in vectors[LINEAR_SHAPES[name][1]]:
                    yield Candidate("quantized", problem, ("vector", VectorConfig(*config)))
            if rows < 16 or name == "head":
                continue
            splits = ((8, 4, 2) if rows <= 128 else (4, 2)) if name in ("qkv", "o", "down") else (1,)
            for (outputs, words, warps, stages), parts in itertools.product(tiles, splits):
                for tile_rows in (64, 128, 256) if rows > 64 else (rows,):
                    if tile_rows <= rows and outputs * tile_rows <= 256 * 128:
                        shape = QuantizedConfig(outputs, tile_rows, words, warps, stages, parts)
                        yield Candidate("quantized", problem, ("quantized", shape))
    for bits, name, rows in itertools.product((8, 5), LINEAR_SHAPES, (1, 64)):
        problem = QuantizedLinear(name, rows, bits=bits)
        if rows == 1 and bits == 8:
            for config in ((16, 4, 4), (16, 4, 7), (16, 2, 8), (16, 8, 2), (16, 8, 4)):
                yield Candidate("quantized", problem, ("vector", VectorConfig(*config)))
        else:
            yield Candidate("quantized", problem, ("quantized", QuantizedConfig(64, max(rows, 16), 32, 4, 4)))
    yield Candidate("quantized", QuantizedLinear("gate_up", 1), ("unpack", None))


def _hopper_quantized() -> Iterator[Candidate]:
    """For devices of compute capability 9.0, beside the kernel for all devices. Panels, stages of x and of words."""
    for name, rows in itertools.product(("qkv", "o", "gate_up", "down"), (16, 64, 128, 256, 2048)):
        for silu in (False, True) if name == "gate_up" and rows <= 128 else (False,):
            problem = QuantizedLinear(name, rows, silu=silu)
            few = name != "gate_up"
            if rows <= quantized_matmul.MAX_ROWS:
                plain = quantized_matmul.default_config(
                    rows, LINEAR_SHAPES[name][0] // (2 if silu else 1), silu_and_mul=silu, may_split=few
                )
                yield Candidate("hopper_quantized", problem, ("quantized", plain))
            for panels, tile_rows, x_stages, word_stages in _HOPPER_TILES[rows]:
                if silu and panels == 1:
                    continue
                for splits in (1,) if not few or rows > 512 else _HOPPER_SPLITS[panels, max(rows // 128, 1)]:
                    config = HopperMatmulConfig(panels, tile_rows, x_stages, word_stages, splits)
                    yield Candidate("hopper_quantized", problem, ("hopper", config))


_HOPPER_TILES = {
    16: [(2, 16, 16, 5), (2, 16, 8, 3), (1, 16, 16, 8)],
    64: [(2, 64, 8, 4), (2, 64, 12, 3), (1, 64, 8, 8), (1, 64, 12, 6)],
    128: [(2, 128, 5, 3), (2, 128, 6, 3), (1, 128, 8, 4), (1, 128, 6, 6)],
    256: [(2, 128, 5, 3), (2, 128, 8, 2), (1, 256, 4, 4), (1, 256, 5, 3)],
    2048: [(2, 128, 5, 3), (2, 128, 8, 2), (1, 256, 4, 4), (1, 256, 5, 3)],
}
"""By rows."""
_HOPPER_SPLITS = {(2, 1): (4, 8), (1, 1): (2, 4, 8), (2, 2): (1, 2, 4), (1, 2): (1, 2, 4)}
"""By panels and tiles of rows."""


def _scaled() -> Iterator[Candidate]:
    """The vector kernel on 8-bit numbers without groups: outputs, warps, depth."""
    configs = [(16, 4, 4), (16, 4, 7), (16, 2, 8), (16, 8, 2), (16, 8, 4), (16, 4, 2), (32, 4, 4), (32, 4, 2),
               (32, 2, 4), (32, 2, 8), (16, 2, 4), (32, 8, 2)]  # fmt: skip
    for activations, name in itertools.product(("fp8", "int8"), LINEAR_SHAPES):
        for silu in (False, True) if name == "gate_up" else (False,):
            problem = QuantizedLinear(name, 1, bits=8, silu=silu, activations=activations)
            for config in configs:
                yield Candidate("scaled", problem, ("vector", VectorConfig(*config)))


def _hopper_scaled() -> Iterator[Candidate]:
    """For devices of compute capability 9.0, beside the kernel for all devices: outputs of a group, rows, stages."""
    tiles = {
        64: [(64, 64, 8), (128, 64, 5)],
        128: [(64, 128, 6), (128, 128, 4)],
        256: [(64, 256, 4), (128, 128, 4), (64, 128, 6)],
        2048: [(64, 256, 4), (128, 128, 4)],
    }
    for name, rows in itertools.product(("qkv", "o", "gate_up", "down"), tiles):
        problem = QuantizedLinear(name, rows, bits=8, activations="int8")
        yield Candidate("hopper_scaled", problem, ("scaled", scaled_matmul.default_config(rows)))
        for tile in tiles[rows]:
            for splits in (1,) if name == "gate_up" or rows > 512 else (1, 2, 4):
                yield Candidate("hopper_scaled", problem, ("hopper_scaled", HopperScaledConfig(*tile, splits)))


def _rows() -> Iterator[Candidate]:
    """Rows that come to 8 bits in one pass, and in two."""
    for rows, kind in itertools.product((32, 64, 256, 2048), ("int8", "fp8")):
        norm, silu = NormRows(rows, kind), SiluRows(rows, kind)
        for warps in (4, 8, 16):
            yield Candidate("norm_8_bits", norm, ("together", NormConfig(1, warps)))
        yield Candidate("norm_8_bits_apart", norm, ("apart", None))
        for warps in (4, 8, 16, 32):
            yield Candidate("silu_8_bits", silu, ("together", SiluConfig(warps)))
        yield Candidate("silu_8_bits_apart", silu, ("apart", None))


def _lora() -> Iterator[Candidate]:
    """Inputs per split, outputs per tile, slots at once."""
    for (rows, adapters), name in itertools.product(((1, 1), (64, 8), (64, 32)), ("qkv", "o", "gate_up", "down")):
        problem = Lora(name, rows, adapters)
        for split, outputs, entries in itertools.product((2048, 4096), (64, 128), (2, 4, 8)):
            yield Candidate("lora", problem, (LoraConfig(split, outputs, entries),))


def _owner(candidate: Candidate) -> int:
    """Equal for candidates that compile to the same kernel, so that no two workers compile it."""
    sizes = LINEAR_SHAPES.get(getattr(candidate.problem, "name", ""), (0, 0))
    return zlib.crc32(repr((candidate.arguments, sizes[1], getattr(candidate.problem, "rows", 0))).encode())


def _compile(worker: int, workers: int, only: list[str]) -> None:
    """Compile one worker's share of the candidates into the Triton language's cache, on the CPU."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    torch.set_num_threads(1)
    from triton.runtime import driver

    from tests.fakes.fake_hopper import FakeHopperDriver

    driver.set_active(FakeHopperDriver())
    prepared: Any = None
    for candidate in candidates():
        if (only and candidate.name not in only) or candidate.name == "linear" or _owner(candidate) % workers != worker:
            continue
        if prepared is not candidate.problem:
            prepared = candidate.problem
            prepared.prepare("cpu")
        try:
            prepared.launches(*candidate.arguments)[0]()
        except Exception as error:
            print(f"not compiled: {candidate}: {type(error).__name__}", flush=True)


def _time(candidate: Candidate) -> dict[str, Any]:
    problem = candidate.problem
    settings = [asdict(a) if hasattr(a, "__dataclass_fields__") else a for a in candidate.arguments]
    line: dict[str, Any] = {"kernel": candidate.name, "shape": str(problem), "config": settings}
    try:
        launches = problem.launches(*candidate.arguments)
        problem.poison()
        launches[-1]()
        error = problem.error()
        if not error < _MAX_ERROR:
            return {**line, "wrong": error}
        ms = graph_ms(launches, 5)
    except Exception as error:
        return {**line, "failed": f"{type(error).__name__}: {str(error)[:100]}"}
    return {**line, "us": ms * 1e3, "gb_s": problem.num_bytes / ms / 1e6, "tflop_s": problem.flops / ms / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    workers = os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_compile, args=(i, workers, options.only)) for i in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    best: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with options.out.open("a") as file:
        file.write(json.dumps({"read_gb_s": read_bandwidth(), "bf16_tflop_s": matmul_rate()}) + "\n")
        prepared: Any = None
        for candidate in candidates():
            if options.only and candidate.name not in options.only:
                continue
            if prepared is not candidate.problem:
                if prepared is not None:
                    prepared.release()
                prepared = candidate.problem
                prepared.prepare("cuda")
            line = _time(candidate)
            file.write(json.dumps(line) + "\n")
            file.flush()
            best.setdefault((line["kernel"], line["shape"]), []).append(line)
    for (kernel, shape), lines in best.items():
        for line in sorted(lines, key=lambda line: line.get("us", 1e9))[:1]:
            shown = [list(c.values()) if isinstance(c, dict) else c for c in line["config"]]
            numbers = {key: round(line[key], 1) for key in ("us", "gb_s", "tflop_s") if key in line}
            print(kernel, shape, shown, numbers or line, flush=True)


if __name__ == "__main__":
    main()
