"""Grids and RTN, against the formulas written out for single groups."""

from __future__ import annotations

import itertools

import pytest
import torch

from trident_llm.quantization import rtn
from trident_llm.quantization.grid import grid_of_range

BITS = (4, 5, 6, 8)


def weight_of(num_outputs: int, num_inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize(("bits", "symmetric"), list(itertools.product(BITS, (False, True))))
def test_every_weight_goes_to_the_nearest_value_of_its_grid(bits, symmetric):
    weight = weight_of(7, 96)
    result = rtn.quantize(weight, bits=bits, group_size=32, symmetric=symmetric)
    assert result.codes.dtype == result.zero_points.dtype == torch.uint8 and result.scales.dtype == torch.float16
    assert int(result.codes.max()) < 2**bits and int(result.zero_points.max()) < 2**bits
    levels = torch.arange(2**bits).float()
    for row, group in itertools.product(range(7), range(3)):
        columns = slice(group * 32, group * 32 + 32)
        values = result.scales[row, group].float() * (levels - result.zero_points[row, group].float())
        distances = (weight[row, columns, None] - values).abs()
        chosen = distances.gather(1, result.codes[row, columns, None].long())[:, 0]
        assert (chosen <= distances.amin(1) + 1e-6).all()
    if symmetric:
        assert (result.zero_points == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_range_that_is_tried_has_a_smaller_error(symmetric):
    weight = weight_of(16, 64)
    weight[:, 0] *= 6
    result = rtn.quantize(weight, bits=4, group_size=64, symmetric=symmetric)
    error = (result.dequantize() - weight).square().sum(1)
    whole = grid_of_range(
        weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), 4, symmetric=symmetric, dtype=torch.float16
    )
    for shrink in torch.linspace(1, 0.5, 16).tolist():
        low, high = weight.amin(1) * shrink, weight.amax(1) * shrink
        if symmetric:
            scale, zero = (torch.maximum(-low, high) / 7).half().float(), torch.full((16,), 8.0)
        else:
            scale = ((high - low) / 15).half().float()
            zero = (-low / scale).round().clamp(0, 15)
        codes = (weight / scale[:, None] + zero[:, None]).round().clamp(0, 15)
        value = (codes - zero[:, None]) * scale[:, None]
        assert (error <= (value - weight).square().sum(1) + 1e-6).all()
    unclipped = whole.decode(whole.encode(weight.view(16, 1, 64))).view(16, 64)
    assert error.sum() < 0.95 * (unclipped - weight).square().sum()


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.12), (5, 0.06), (6, 0.03), (8, 0.008)])
def test_more_bits_are_nearer(bits, bound):
    weight = weight_of(64, 256)
    result = rtn.quantize(weight, bits=bits, group_size=64, symmetric=bits == 8)
    assert (result.dequantize() - weight).norm() < bound * weight.norm()


def test_a_group_without_any_weight_stays_zero():
    weight = weight_of(4, 64)
    weight[1:3, :32] = 0
    result = rtn.quantize(weight, bits=4, group_size=32, symmetric=False)
    assert (result.dequantize()[1:3, :32] == 0).all() and result.scales.isfinite().all()


def test_weights_of_one_sign_keep_a_grid_that_holds_zero():
    result = rtn.quantize(weight_of(4, 64).abs() + 0.5, bits=4, group_size=32, symmetric=False)
    assert (result.zero_points == 0).all()


@pytest.mark.parametrize("factor", [1e-6, 1e7])
def test_scales_beyond_float16_are_float32(factor):
    weight = weight_of(4, 64)
    small, large = (rtn.quantize(w, bits=6, group_size=32, symmetric=False) for w in (weight, weight * factor))
    assert large.scales.dtype == torch.float32
    torch.testing.assert_close(large.dequantize() / factor, small.dequantize(), rtol=0, atol=0.01)


def test_pieces_of_a_large_weight_are_quantized_as_the_whole():
    weight = weight_of(600, 256)
    whole = rtn.quantize(weight, bits=4, group_size=64, symmetric=False)
    part = rtn.quantize(weight[300:310], bits=4, group_size=64, symmetric=False)
    assert torch.equal(whole.codes[300:310], part.codes) and torch.equal(whole.scales[300:310], part.scales)


def test_bf16_weights():
    weight = weight_of(4, 64).bfloat16()
    expected = rtn.quantize(weight.float(), bits=4, group_size=32, symmetric=False)
    assert torch.equal(rtn.quantize(weight, bits=4, group_size=32, symmetric=False).codes, expected.codes)
