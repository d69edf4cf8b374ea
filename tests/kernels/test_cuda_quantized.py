"""Products with packed weights in the Triton language against float64 torch, and packing against its definition."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cuda_cases import (
    DEVICE,
    DTYPES,
    HALF_DTYPES,
    HOPPER_PROCESSORS,
    INTERPRETED,
    PDL,
    assert_close,
    poisoned,
    random_tensor,
)
from trident_llm.kernels.packed_weight import PANEL, pack
from trident_llm.kernels.quantized_linear import QuantizedLinear
from trident_llm.kernels.quantized_matmul import QuantizedConfig, quantized_matmul
from trident_llm.kernels.quantized_vector import VectorConfig, quantized_vector, supports
from trident_llm.kernels.quantized_weight import BITS, QuantizedWeight
from trident_llm.kernels.sum_parts import sum_parts
from trident_llm.kernels.unpack_weight import unpack_weight

pytestmark = pytest.mark.gpu

SIZES = [(70, 576, 64), (33, 160, 32), (40, 576, 576), (64, 512, 128)]
"""Outputs, inputs and group size."""
if not INTERPRETED:
    SIZES += [(6144, 4096, 128), (4096, 14336, 64)]
ASM = not INTERPRETED


def random_weight(size: tuple[int, int, int], bits: int, seed: int = 0) -> QuantizedWeight:
    num_outputs, num_inputs, group_size = size
    generator = torch.Generator().manual_seed(seed)
    groups = (num_outputs, num_inputs // group_size)
    codes = torch.randint(0, 2**bits, (num_outputs, num_inputs), generator=generator)
    return QuantizedWeight(
        codes=codes.to(torch.uint8).to(DEVICE),
        scales=((torch.rand(groups, generator=generator) + 0.5) / 2**bits).half().to(DEVICE),
        zero_points=torch.randint(0, 2**bits, groups, generator=generator).to(torch.uint8).to(DEVICE),
        bits=bits,
        group_size=group_size,
    )


def product(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    return x.double() @ weight.dequantize(torch.float64).T


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_weight_gives_the_weight_back(dtype: torch.dtype, size: tuple[int, int, int], bits: int) -> None:
    weight = random_weight(size, bits)
    out = poisoned(*weight.shape, dtype=dtype)
    unpack_weight(pack(weight), out, pdl=PDL, use_asm=ASM)
    torch.testing.assert_close(out, weight.dequantize(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 5, 70])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_quantized_matmul(dtype: torch.dtype, num_rows: int, size: tuple[int, int, int], bits: int) -> None:
    weight, x = random_weight(size, bits), random_tensor(num_rows, size[1], dtype=dtype)
    bias = random_tensor(size[0], dtype=dtype, seed=2)
    out = poisoned(num_rows, size[0], dtype=dtype)
    quantized_matmul(x, pack(weight), out, pdl=PDL, use_asm=ASM)
    assert_close(out, product(x, weight))
    for config in (QuantizedConfig(64, 16, 64, 4, 2), QuantizedConfig(128, 64, 32, 8, 3)):
        quantized_matmul(x, pack(weight), out, bias=bias, config=config, pdl=PDL, use_asm=ASM)
        assert_close(out, product(x, weight) + bias.double())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [64, 128, 2048])
@pytest.mark.parametrize("num_rows", [1, 13] if INTERPRETED else [1, 8, 13])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_quantized_vector(dtype: torch.dtype, num_rows: int, group_size: int, bits: int) -> None:
    num_outputs = 64 if INTERPRETED else 192
    weight, x = random_weight((num_outputs, 2048, group_size), bits), random_tensor(num_rows, 2048, dtype=dtype)
    packed, bias = pack(weight), random_tensor(num_outputs, dtype=dtype, seed=2)
    assert supports(packed)
    for config in (None, VectorConfig(16, 2, 1), VectorConfig(32, 4, 1)):
        out = poisoned(num_rows, num_outputs, dtype=dtype)
        quantized_vector(x, packed, out, bias=bias, config=config, pdl=PDL)
        assert_close(out, product(x, weight) + bias.double())
        gate, up = product(x, weight).to(dtype).double().chunk(2, -1)
        out = poisoned(num_rows, num_outputs // 2, dtype=dtype)
        quantized_vector(x, packed, out, silu_and_mul=True, config=config, pdl=PDL)
        assert_close(out, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("hopper_processors", HOPPER_PROCESSORS)
@pytest.mark.parametrize("bits", [4] if INTERPRETED else BITS)
@pytest.mark.parametrize("num_rows", [7, 40] if INTERPRETED else [1, 7, 16, 40, 100, 200, 500])
def test_the_linear_layer_of_every_row_count(num_rows: int, bits: int, hopper_processors: int) -> None:
    linear = QuantizedLinear(pdl=PDL, hopper_processors=hopper_processors, use_asm=ASM)
    num_outputs, dtype = 128 if INTERPRETED else 512, HALF_DTYPES[-1]
    weight, x = random_weight((num_outputs, 1024, 128), bits), random_tensor(num_rows, 1024, dtype=dtype)
    packed, bias = pack(weight), random_tensor(num_outputs, dtype=dtype, seed=2)
    expected = product(x, weight)
    assert_close(linear.linear(x, packed, bias), expected + bias.double())
    gate, up = expected.to(dtype).double().chunk(2, -1)
    assert_close(linear.silu_and_mul(x, packed, None), torch.nn.functional.silu(gate) * up)
    residual, norm_weight = random_tensor(num_rows, num_outputs, dtype=dtype, seed=3), x.new_ones(num_outputs)
    total = (expected.to(dtype) + residual).double()
    normed = linear.add_rms_norm(x, packed, None, residual, norm_weight, 1e-5)
    assert_close(residual, total)
    assert_close(normed, total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_rows", [3, 70])
def test_silu_equals_two_steps(num_rows: int, bits: int) -> None:
    weight, x = random_weight((142, 512, 64), bits), random_tensor(num_rows, 512, dtype=torch.float16)
    gate, up = product(x, weight).to(torch.float16).double().chunk(2, -1)
    out = poisoned(num_rows, 71, dtype=torch.float16)
    quantized_matmul(x, pack(weight), out, silu_and_mul=True, pdl=PDL, use_asm=ASM)
    assert_close(out, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("num_splits", [2, 4])
def test_parts_add_up(num_splits: int) -> None:
    weight, x = random_weight((64, 1024, 128), 4), random_tensor(5, 1024, dtype=torch.float16)
    bias = random_tensor(64, dtype=torch.float16, seed=2)
    parts, out = poisoned(num_splits, 5, 64, dtype=torch.float32), poisoned(5, 64, dtype=torch.float16)
    config = QuantizedConfig(64, 16, 32, 4, 3, num_splits)
    quantized_matmul(x, pack(weight), parts, config=config, pdl=PDL, use_asm=ASM)
    sum_parts(parts, out, bias=bias, pdl=PDL)
    assert_close(out, product(x, weight) + bias.double())


def test_columns_in_another_order() -> None:
    weight, order = random_weight((64, 512, 128), 4), torch.randperm(512, generator=torch.Generator().manual_seed(1))
    permuted = QuantizedWeight(**{**vars(weight), "input_order": order.to(DEVICE)})
    x = random_tensor(600, 512, dtype=torch.float32)
    assert_close(QuantizedLinear(pdl=PDL, use_asm=ASM).linear(x, pack(permuted), None), product(x, permuted))
    assert torch.equal(permuted.dequantize()[:, order.to(DEVICE)], weight.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_words_hold_the_codes_where_they_are_said_to(bits: int) -> None:
    weight = random_weight((70, 576, 64), bits)
    packed = pack(weight)
    codes, chunk, extra = weight.codes.cpu().int(), packed.chunk, bits - 4
    low, high = packed.low.cpu().int() & 0xFFFF, None if packed.high is None else packed.high.cpu().int() & 0xFFFF
    for output, column in [(0, 0), (69, 575), (13, 300), (64, 129)]:
        panel, row = divmod(output, PANEL)
        word, c = divmod(column, chunk)
        if bits == 8:
            found = low[panel, word // 2, row, c] >> (8 * (word % 2)) & 255
        else:
            block, j = divmod(word, 4)
            found = low[panel, block, row, c] >> (4 * j) & 15
            if high is not None:
                per_word = 4 // extra
                bit = extra * (4 * (block % per_word) + j)
                found |= (high[panel, block // per_word, row, c] >> bit & (2**extra - 1)) << 4
        assert found == codes[output, column]
