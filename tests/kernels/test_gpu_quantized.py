"""Quantized linear layers where the Triton language's interpreter does not follow: Gluon, and the dispatch."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cuda_cases import DEVICE, HALF_DTYPES, IS_HOPPER, PDL, assert_close, poisoned, random_tensor
from tests.kernels.test_cuda_quantized import product, random_weight
from tests.kernels.test_cuda_scaled import CODES
from tests.kernels.test_cuda_scaled import random_weight as random_bytes
from trident_llm.kernels.packed_bytes import pack_bytes
from trident_llm.kernels.packed_weight import pack
from trident_llm.kernels.quantized_linear import QuantizedLinear
from trident_llm.kernels.quantized_vector import VectorConfig, quantized_vector, supports
from trident_llm.kernels.quantized_weight import BITS
from trident_llm.kernels.scaled_linear import ScaledLinear

pytestmark = pytest.mark.gpu
HOPPER_PROCESSORS = [0, 132] if IS_HOPPER else [0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [64, 128, 1024])
@pytest.mark.parametrize("num_rows", [1, 8, 13])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_quantized_vector(dtype: torch.dtype, num_rows: int, group_size: int, bits: int) -> None:
    weight, x = random_weight((192, 1024, group_size), bits), random_tensor(num_rows, 1024, dtype=dtype)
    packed, bias = pack(weight), random_tensor(192, dtype=dtype, seed=2)
    assert supports(packed)
    for config in (None, VectorConfig(16, 2, 1), VectorConfig(32, 4, 1)):
        out = poisoned(num_rows, 192, dtype=dtype)
        quantized_vector(x, packed, out, bias=bias, config=config, pdl=PDL)
        assert_close(out, product(x, weight) + bias.double())
        gate, up = product(x, weight).to(dtype).double().chunk(2, -1)
        out = poisoned(num_rows, 96, dtype=dtype)
        quantized_vector(x, packed, out, silu_and_mul=True, config=config, pdl=PDL)
        assert_close(out, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("hopper_processors", HOPPER_PROCESSORS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_rows", [1, 7, 16, 40, 100, 200, 500])
def test_the_linear_layer_of_every_row_count(num_rows: int, bits: int, hopper_processors: int) -> None:
    linear, dtype = QuantizedLinear(pdl=PDL, hopper_processors=hopper_processors), torch.bfloat16
    weight, x = random_weight((512, 1024, 128), bits), random_tensor(num_rows, 1024, dtype=dtype)
    packed, bias = pack(weight), random_tensor(512, dtype=dtype, seed=2)
    expected = product(x, weight)
    assert_close(linear.linear(x, packed, bias), expected + bias.double())
    gate, up = expected.to(dtype).double().chunk(2, -1)
    assert_close(linear.silu_and_mul(x, packed, None), torch.nn.functional.silu(gate) * up)
    residual, norm_weight = random_tensor(num_rows, 512, dtype=dtype, seed=3), torch.ones(512, device=DEVICE).to(dtype)
    total = (expected.to(dtype) + residual).double()
    normed = linear.add_rms_norm(x, packed, None, residual, norm_weight, 1e-5)
    assert_close(residual, total)
    assert_close(normed, total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5))


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 13])
def test_quantized_vector_of_bytes(num_rows: int, dtype: torch.dtype, codes: torch.dtype) -> None:
    weight, x = random_bytes((192, 1024), codes), random_tensor(num_rows, 1024, dtype=dtype)
    packed = pack_bytes(weight)
    out = poisoned(num_rows, 192, dtype=dtype)
    quantized_vector(x, packed, out, pdl=PDL)
    assert_close(out, product(x, weight))
    gate, up = product(x, weight).to(dtype).double().chunk(2, -1)
    out = poisoned(num_rows, 96, dtype=dtype)
    quantized_vector(x, packed, out, silu_and_mul=True, pdl=PDL)
    assert_close(out, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("hopper_processors", HOPPER_PROCESSORS)
@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 16, 40, 100, 500])
def test_the_scaled_linear_layer_of_every_row_count(
    num_rows: int, codes: torch.dtype, hopper_processors: int
) -> None:
    linear, dtype = ScaledLinear(pdl=PDL, hopper_processors=hopper_processors), torch.bfloat16
    weight, x = random_bytes((512, 1024), codes), random_tensor(num_rows, 1024, dtype=dtype)
    packed, bias = pack_bytes(weight), random_tensor(512, dtype=dtype, seed=2)
    # Activations lose up to a step of 1/127 or of 1/16; over 1,024 of them about 1 and 3%.
    limit = 1e-2 if num_rows <= 16 else 2e-2 if codes == torch.int8 else 5e-2
    expected = product(x, weight)
    assert_close(linear.linear(x, packed, bias), expected + bias.double(), limit)
    gate, up = expected.to(dtype).double().chunk(2, -1)
    assert_close(linear.silu_and_mul(x, packed, None), torch.nn.functional.silu(gate) * up, 2 * limit)
    residual, norm_weight = random_tensor(num_rows, 512, dtype=dtype, seed=3), torch.ones(512, device=DEVICE).to(dtype)
    total = (expected.to(dtype) + residual).double()
    normed = linear.add_rms_norm(x, packed, None, residual, norm_weight, 1e-5)
    assert_close(residual, total, limit)
    assert_close(normed, total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5), limit)
