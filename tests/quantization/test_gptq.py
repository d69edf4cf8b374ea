"""GPTQ against the algorithm as the paper writes it: one column at a time, with the inverse Hessian in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.quantization.layers import calibrated_layer
from trident_llm.quantization import gptq, rtn
from trident_llm.quantization.grid import as_groups, search_grid
from trident_llm.quantization.statistics import InputStatistics


def optimal_brain_quantizer(weight: Tensor, hessian: Tensor, group_size: int, bits: int) -> Tensor:
    """Rows of codes: fix a column, spread its error over those that are left by the inverse of *their* Hessian.

    The Hessian of what is left is inverted anew for every column, without any factorization.
    """
    energy = hessian.diagonal()
    grid = search_grid(
        as_groups(weight, group_size),
        bits,
        symmetric=False,
        dtype=torch.float16,
        error=lambda d: (d.square() * energy.float().view(-1, group_size)).sum(-1),
    )
    order = energy.argsort(descending=True).tolist()
    values, codes = weight.double().clone(), torch.zeros_like(weight)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(len(order))
    for place, column in enumerate(order):
        rest = order[place:]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        scale, zero = grid.scales[:, column // group_size].double(), grid.zero_points[:, column // group_size].double()
        codes[:, column] = (values[:, column] / scale + zero).round().clamp(0, 2**bits - 1).float()
        error = (values[:, column] - (codes[:, column] - zero) * scale) / inverse[0, 0]
        values[:, rest] -= error[:, None] * inverse[0]
    return codes.to(torch.uint8)


@pytest.mark.parametrize("bits", [4, 6])
def test_codes_are_those_of_the_algorithm_without_its_shortcuts(bits):
    layer = calibrated_layer(num_outputs=12, num_inputs=192)
    result = gptq.quantize(layer.weight, layer.statistics, bits=bits, group_size=32, symmetric=False)
    expected = optimal_brain_quantizer(layer.weight, layer.statistics.hessian, 32, bits)
    # float32 against float64: a weight near the middle of two codes may go the other way, and the rest of its row too.
    assert (result.codes == expected).float().mean() > 0.97


def test_inverse_factor():
    hessian = calibrated_layer().statistics.hessian
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(128)
    factor = gptq.inverse_factor(hessian)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close((factor.T @ factor).double() @ damped, torch.eye(128).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("bits", "gain"), [(4, 0.5), (5, 0.5), (6, 0.5), (8, 0.7)])
def test_the_output_is_nearer_than_with_rounding_alone(bits, gain):
    layer = calibrated_layer()
    symmetric = bits == 8
    rounded = rtn.quantize(layer.weight, bits=bits, group_size=64, symmetric=symmetric)
    result = gptq.quantize(layer.weight, layer.statistics, bits=bits, group_size=64, symmetric=symmetric)
    assert result.input_order is None
    assert layer.output_error(result.dequantize()) < gain * layer.output_error(rounded.dequantize())


@pytest.mark.parametrize("num_dead", [5, 128])
def test_inputs_that_are_always_zero(num_dead):
    """Their Hessian cannot be inverted as it is; their weights are rounded like any other."""
    layer = calibrated_layer()
    x = layer.x.clone()
    x[:, :num_dead] = 0
    statistics = InputStatistics(x.abs().mean(0), x.abs().amax(0), x, x.T @ x / x.shape[0])
    result = gptq.quantize(layer.weight, statistics, bits=4, group_size=32, symmetric=False).dequantize()
    assert result.isfinite().all()
    assert (result - layer.weight).norm() < 0.4 * layer.weight.norm()


def test_a_hessian_of_too_few_rows_is_damped_until_it_can_be_factored():
    layer = calibrated_layer()
    row = layer.x[:1] * 1e3
    statistics = InputStatistics(row[0].abs(), row[0].abs(), row, row.T @ row)
    assert gptq.quantize(layer.weight, statistics, bits=4, group_size=32, symmetric=False).scales.isfinite().all()
