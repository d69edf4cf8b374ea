"""SmoothQuant (Xiao et al. 2022): weights and activations in 8 bits, large inputs balanced against their weights.

scales = size(x) ** alpha / size(w) ** (1 - alpha) per input, alpha by search for each layer. The paper's sizes are the
largest magnitudes. Layers err less with the root of the mean square for w, and for x with that or its geometric mean
with the largest: the largest of a whole text is that of a few tokens, and each token has a scale of its own. Weights
have a scale per output, activations one per token, found while serving.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.layer_cache import SCALED_LIMITS
from ..kernels.quantized_weight import QuantizedWeight, scaled_rows
from .statistics import InputStatistics

_ALPHAS = tuple(step / 20 for step in range(5, 18))
_LIMIT = SCALED_LIMITS[torch.int8]
_SMALLEST = 1e-12


def search_scales(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """The scales [in] with the least squared error in the sampled outputs; ones where no alpha betters them."""
    weight = weight.float()
    expected = statistics.sample @ weight.T
    mean_x = statistics.sample.square().mean(0).sqrt_().clamp_(min=1e-5)
    largest_x = statistics.max_abs.clamp(min=1e-5)
    size_w = weight.square().mean(0).sqrt_().clamp_(min=1e-5)
    best = torch.ones_like(mean_x)
    least = _output_error(weight, statistics.sample, expected)
    for size_x in (mean_x, (mean_x * largest_x).sqrt()):
        for alpha in _ALPHAS:
            scales = size_x**alpha / size_w ** (1 - alpha)
            scales = (scales / (scales.amax() * scales.amin()).sqrt()).clamp(1e-4, 1e4)
            loss = _output_error(weight * scales, statistics.sample / scales, expected)
            best = torch.where(loss < least, scales, best)
            least = torch.minimum(loss, least)
    return best


def _output_error(weight: Tensor, x: Tensor, expected: Tensor) -> Tensor:
    return (to_int8_rows(x) @ to_int8_rows(weight).T).sub_(expected).square_().sum()


def to_int8_rows(values: Tensor) -> Tensor:
    """values [..., N] rounded to 255 steps of a scale per row, still float: what int8 operands stand for."""
    scales = values.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST) / _LIMIT
    return (values / scales).round_().mul_(scales)


def quantize(weight: Tensor) -> QuantizedWeight:
    """weight [out, in], already scaled: symmetric codes with a scale per output, for int8 activations."""
    scales = weight.float().abs().amax(-1, keepdim=True).clamp(min=_SMALLEST) / _LIMIT
    codes = (weight.float() / scales).round_().add_(128).to(torch.uint8)
    return scaled_rows(codes, scales, "int8")
