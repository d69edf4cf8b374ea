"""What calibration gathers, against the formulas over all rows at once."""

from __future__ import annotations

import pytest
import torch

from tests.quantization.layers import calibrated_layer
from trident_llm.quantization.statistics import SAMPLE_ROWS, Gatherer


def test_statistics_are_those_of_all_rows():
    layer = calibrated_layer(num_rows=700)
    x, statistics = layer.x, layer.statistics
    torch.testing.assert_close(statistics.hessian, x.T @ x / 700, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.mean_abs, x.abs().mean(0))
    assert torch.equal(statistics.max_abs, x.abs().amax(0))


@pytest.mark.parametrize("pieces", [[5000], [1, 999, 4000], [1000] * 5, [7] * 714 + [2]])
def test_the_sample_does_not_depend_on_the_pieces(pieces):
    x = torch.arange(5000.0)[:, None].expand(5000, 4)
    gatherer = Gatherer(4, 5000, x.device, hessian=False)
    for part in x.split(pieces):
        gatherer.add(part.unflatten(0, (1, -1)))
    sample = gatherer.result().sample
    assert torch.equal(sample, x[:: 5000 // SAMPLE_ROWS])
    assert gatherer.result().hessian is None


def test_output_error_is_the_mean_over_rows():
    layer = calibrated_layer()
    difference = 0.01 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
    expected = layer.output_error(layer.weight + difference)
    torch.testing.assert_close(layer.statistics.output_error(difference).item(), expected, rtol=1e-4, atol=0)


def test_statistics_of_divided_inputs():
    layer = calibrated_layer()
    scales = torch.rand(layer.x.shape[1], generator=torch.Generator().manual_seed(2)) + 0.5
    gatherer = Gatherer(layer.x.shape[1], layer.x.shape[0], layer.x.device, hessian=True)
    gatherer.add(layer.x / scales)
    divided, expected = layer.statistics.divided_by(scales), gatherer.result()
    for name in ("mean_abs", "max_abs", "sample", "hessian"):
        torch.testing.assert_close(getattr(divided, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
