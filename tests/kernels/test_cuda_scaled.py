"""Products of 8-bit activations with 8-bit weights in the Triton language against float64 torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.cuda_cases import (
    HALF_DTYPES,
    HOPPER_PROCESSORS,
    INTERPRETED,
    PDL,
    assert_close,
    poisoned,
    random_tensor,
)
from trident_llm.kernels.packed_bytes import BLOCK, PackedBytes, pack_bytes, pack_quantized
from trident_llm.kernels.packed_weight import PackedWeight
from trident_llm.kernels.quantize_rows import QuantizedRows, quantize_rows
from trident_llm.kernels.quantized_linear import QuantizedLinear
from trident_llm.kernels.quantized_vector import quantized_vector
from trident_llm.kernels.quantized_weight import QuantizedWeight
from trident_llm.kernels.scaled_linear import ScaledLinear
from trident_llm.kernels.scaled_matmul import ScaledConfig, scaled_matmul

pytestmark = pytest.mark.gpu

CODES = [torch.int8] if INTERPRETED else [torch.int8, torch.float8_e4m3fn]
"""The interpreter's numpy knows no 8-bit floats."""
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SIZES = [(70, 576), (33, 160)] if INTERPRETED else [(70, 576), (33, 160), (6144, 4096), (4096, 14336)]


def random_weight(size: tuple[int, int], codes: torch.dtype) -> QuantizedWeight:
    weight = random_tensor(*size, seed=1, scale=0.02)
    scales = weight.abs().amax(-1, keepdim=True) / LIMITS[codes]
    rounded = (weight / scales).round().add(128).to(torch.uint8) if codes == torch.int8 else (weight / scales).to(codes)
    zeros = torch.full_like(scales, 128, dtype=torch.uint8)
    activations = "int8" if codes == torch.int8 else "fp8"
    return QuantizedWeight(rounded, scales, zeros, 8, size[1], activations)  # type: ignore[arg-type]


def in_order(values: torch.Tensor, num_inputs: int) -> torch.Tensor:
    """Columns of packed bytes in the order of the inputs."""
    return values.float().unflatten(-1, (-1, BLOCK // 2, 2)).transpose(-1, -2).flatten(-3)[..., :num_inputs]


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_packing_keeps_every_code(codes: torch.dtype) -> None:
    weight = random_weight((70, 576), codes)
    packed = pack_bytes(weight)
    torch.testing.assert_close(in_order(packed.codes, 576) * packed.scales[:, None], weight.dequantize())


def test_zero_points_are_not_lost() -> None:
    """Checkpoints may have them beside 8-bit activations, for which there is no layout with zero points."""
    weight = random_weight((64, 256), torch.int8)
    weight = replace(weight, zero_points=torch.full_like(weight.zero_points, 90))
    packed = pack_quantized(weight)
    assert isinstance(packed, PackedWeight)
    x = random_tensor(20, 256, dtype=torch.float16)
    found = QuantizedLinear(pdl=PDL, use_asm=not INTERPRETED).linear(x, packed, None)
    assert_close(found, x.double() @ weight.dequantize().double().T)


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("num_inputs", [576, 160, 14336])
def test_quantize_rows(num_inputs: int, dtype: torch.dtype, codes: torch.dtype) -> None:
    x = random_tensor(5, num_inputs, dtype=dtype)
    rows = quantize_rows(x, codes, pdl=PDL)
    scales = x.float().abs().amax(-1) / LIMITS[codes]
    torch.testing.assert_close(rows.scales, scales)
    found = in_order(rows.values, num_inputs)
    expected = x.float() / scales[:, None]
    if codes == torch.int8:
        assert (found - expected).abs().max() <= 0.5 + 1e-4
    else:
        torch.testing.assert_close(found, expected.to(codes).float(), rtol=0.13, atol=2e-3)


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 17, 70, 300])
def test_scaled_matmul(num_rows: int, size: tuple[int, int], dtype: torch.dtype, codes: torch.dtype) -> None:
    packed: PackedBytes = pack_bytes(random_weight(size, codes))
    rows: QuantizedRows = quantize_rows(random_tensor(num_rows, size[1], dtype=dtype), codes, pdl=PDL)
    bias = random_tensor(size[0], dtype=dtype, seed=2)
    x = in_order(rows.values, size[1]).double() * rows.scales[:, None].double()
    expected = x @ (in_order(packed.codes, size[1]).double() * packed.scales[:, None].double()).T
    out = poisoned(num_rows, size[0], dtype=dtype)
    scaled_matmul(rows, packed, out, pdl=PDL)
    assert_close(out, expected)
    scaled_matmul(rows, packed, out, bias=bias, config=ScaledConfig(128, 64, 4, 3), pdl=PDL)
    assert_close(out, expected + bias.double())


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 13])
def test_quantized_vector(num_rows: int, dtype: torch.dtype, codes: torch.dtype) -> None:
    # A warp has one block of 1,024 inputs, and nothing may be read beyond it.
    weight, x = random_weight((192, 1024), codes), random_tensor(num_rows, 1024, dtype=dtype)
    packed, expected = pack_bytes(weight), x.double() @ weight.dequantize().double().T
    out = poisoned(num_rows, 192, dtype=dtype)
    quantized_vector(x, packed, out, pdl=PDL)
    assert_close(out, expected)
    gate, up = expected.to(dtype).double().chunk(2, -1)
    out = poisoned(num_rows, 96, dtype=dtype)
    quantized_vector(x, packed, out, silu_and_mul=True, pdl=PDL)
    assert_close(out, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("hopper_processors", HOPPER_PROCESSORS)
@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 40] if INTERPRETED else [1, 16, 40, 100, 500])
def test_the_linear_layer_of_every_row_count(num_rows: int, codes: torch.dtype, hopper_processors: int) -> None:
    linear, dtype = ScaledLinear(pdl=PDL, hopper_processors=hopper_processors), HALF_DTYPES[-1]
    num_outputs = 128 if INTERPRETED else 512
    weight, x = random_weight((num_outputs, 2048), codes), random_tensor(num_rows, 2048, dtype=dtype)
    packed, bias = pack_bytes(weight), random_tensor(num_outputs, dtype=dtype, seed=2)
    # Activations lose up to a step of 1/127 or of 1/16; over 2,048 of them about 1 and 3%.
    limit = 1e-2 if num_rows <= 16 else 2e-2 if codes == torch.int8 else 5e-2
    expected = x.double() @ weight.dequantize().double().T
    assert_close(linear.linear(x, packed, bias), expected + bias.double(), limit)
    gate, up = expected.to(dtype).double().chunk(2, -1)
    assert_close(linear.silu_and_mul(x, packed, None), torch.nn.functional.silu(gate) * up, 2 * limit)
    residual, norm_weight = random_tensor(num_rows, num_outputs, dtype=dtype, seed=3), x.new_ones(num_outputs)
    total = (expected.to(dtype) + residual).double()
    normed = linear.add_rms_norm(x, packed, None, residual, norm_weight, 1e-5)
    assert_close(residual, total, limit)
    assert_close(normed, total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5), limit)
