"""Products with quantized weights by warps of different duties against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.kernels.cuda_cases import (
    HALF_DTYPES,
    INTERPRETED,
    PDL,
    RUNS_HOPPER_KERNELS,
    assert_close,
    poisoned,
    random_tensor,
)
from tests.kernels.test_cuda_quantized import product, random_weight
from tests.kernels.test_cuda_scaled import random_weight as random_bytes
from trident_llm.kernels.packed_bytes import pack_bytes
from trident_llm.kernels.packed_weight import pack
from trident_llm.kernels.quantized_matmul_hopper import HopperMatmulConfig, quantized_matmul_hopper, takes
from trident_llm.kernels.quantized_rows import QuantizedRows
from trident_llm.kernels.scaled_matmul_hopper import HopperScaledConfig, scaled_matmul_hopper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not RUNS_HOPPER_KERNELS, reason="kernels of Hopper")]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int]
    """Outputs, inputs and group size."""
    num_rows: int
    config: HopperMatmulConfig | None
    bits: int = 4
    dtype: torch.dtype = torch.bfloat16


CASES = [
    # Rows, outputs and inputs that end within a tile, a panel and a block; groups of all sizes that it takes.
    Case((576, 576, 576), 200, HopperMatmulConfig(2, 128, 5, 3)),
    Case((640, 1088, 64), 64, HopperMatmulConfig(1, 64, 8, 8)),
    Case((500, 1024, 128), 300, HopperMatmulConfig(1, 256, 4, 4), dtype=torch.float16),
    Case((512, 1024, 512), 250, HopperMatmulConfig(2, 128, 5, 3)),
    Case((512, 1024, 128), 16, HopperMatmulConfig(2, 16, 16, 5), bits=8),
    Case((512, 1024, 64), 250, HopperMatmulConfig(2, 128, 5, 3), bits=8, dtype=torch.float16),
    Case((512, 1024, 1024), 250, HopperMatmulConfig(1, 256, 4, 4), bits=8),
    *(Case((512, 2048, 128), num_rows, None) for num_rows in (1, 17, 129)),
]
if not INTERPRETED:
    CASES += [Case((512, 2048, 128), num_rows, None) for num_rows in (9, 40, 100, 600, 3000)]
PROCESSORS = [3] if INTERPRETED else [132, 3]
"""With fewer than tiles programs take several."""


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantized_matmul(case: Case, processors: int) -> None:
    weight = random_weight(case.shape, case.bits)
    num_outputs, num_inputs, _ = case.shape
    x = random_tensor(case.num_rows, num_inputs + 64, dtype=case.dtype)[:, :num_inputs]
    packed, bias = pack(weight), random_tensor(num_outputs, dtype=case.dtype, seed=2)
    assert takes(x, packed)
    config = case.config or HopperMatmulConfig(1, 128, 6, 4)
    out = poisoned(case.num_rows, num_outputs, dtype=case.dtype)
    quantized_matmul_hopper(x, packed, out, bias=bias, num_processors=processors, config=config, pdl=PDL)
    assert_close(out, product(x, weight) + bias.double())


@pytest.mark.parametrize("num_splits", [2, 3, 8])
@pytest.mark.parametrize("num_rows", [16, 150] if INTERPRETED else [16, 100, 300])
def test_splits_of_a_sum(num_rows: int, num_splits: int) -> None:
    weight, x = random_weight((320, 1536, 128), 4), random_tensor(num_rows, 1536, dtype=torch.bfloat16)
    parts = poisoned(num_splits, num_rows, 320, dtype=torch.float32)
    config = HopperMatmulConfig(1, 128, 8, 4, num_splits)
    quantized_matmul_hopper(x, pack(weight), parts, num_processors=132, config=config, pdl=PDL)
    # Parts are float32, unpacked weights of x's dtype.
    assert_close(parts.sum(0), product(x, weight), 4e-3)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("num_rows", [5, 128] if INTERPRETED else [5, 33, 64, 100, 128])
def test_silu_and_mul(num_rows: int, dtype: torch.dtype) -> None:
    weight, x = random_weight((640, 1024, 128), 4), random_tensor(num_rows, 1024, dtype=dtype)
    out = poisoned(num_rows, 320, dtype=dtype)
    quantized_matmul_hopper(x, pack(weight), out, silu_and_mul=True, num_processors=132, pdl=PDL)
    gate, up = product(x, weight).to(dtype).double().chunk(2, -1)
    assert_close(out, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("num_rows", [1, 77, 300] if INTERPRETED else [1, 16, 77, 128, 300, 2100])
def test_scaled_matmul(num_rows: int, dtype: torch.dtype, processors: int) -> None:
    packed = pack_bytes(random_bytes((576, 1088), torch.int8))
    values = random_tensor(num_rows, packed.codes.shape[1], scale=40).round().clamp(-127, 127)
    rows = QuantizedRows(values.to(torch.int8), random_tensor(num_rows, seed=1).abs(), dtype)
    bias = random_tensor(576, dtype=dtype, seed=2)
    sums: Tensor = rows.values.double() @ packed.codes.double().T
    expected = sums * rows.scales.double()[:, None] * packed.scales.double()
    for config in (HopperScaledConfig(128, 128, 4), HopperScaledConfig(64, 256, 4), HopperScaledConfig(64, 64, 8)):
        out = poisoned(num_rows, 576, dtype=dtype)
        scaled_matmul_hopper(rows, packed, out, bias=bias, num_processors=processors, config=config, pdl=PDL)
        assert_close(out, expected + bias.double(), 4e-3)
    parts = poisoned(3, num_rows, 576, dtype=torch.float32)
    config = HopperScaledConfig(64, 128, 6, num_splits=3)
    scaled_matmul_hopper(rows, packed, parts, num_processors=processors, config=config, pdl=PDL)
    assert_close(parts.sum(0), expected, 1e-5)
