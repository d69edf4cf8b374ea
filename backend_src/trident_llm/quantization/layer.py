"""One decoder layer from full precision to integers: scales folded, then each linear layer quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.quantized_weight import QuantizedWeight
from ..models.model_config import ModelConfig
from . import methods
from .float_layer import FloatLayer, LayerForward, Product
from .folding import fold_scales, share_scales
from .modules import LAYER_MODULES
from .scheme import LinearScheme
from .statistics import Gatherer, InputStatistics

Schemes = Mapping[str, LinearScheme | None]
"""By the keys of LAYER_MODULES."""


@dataclass
class QuantizedLayer:
    """What became of a layer, by the keys of LAYER_MODULES; what has no entry stayed as it was."""

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    """Relative, of outputs on calibration text; of the weight where no text was needed."""
    input_scales: dict[str, Tensor] = field(default_factory=dict)
    output_scales: dict[str, Tensor] = field(default_factory=dict)

    def effective_weight(self, key: str) -> Tensor:
        """The quantized weight as it acts between inputs and outputs that nothing was folded into, float32."""
        weight = self.weights[key].dequantize()
        if key in self.input_scales:
            weight = weight / self.input_scales[key]
        if key in self.output_scales:
            weight = weight * self.output_scales[key][:, None]
        return weight


class Calibration:
    """Gathers what the methods of a layer's schemes must know of the inputs, in one pass."""

    def __init__(self, layer: FloatLayer, schemes: Schemes, num_rows: int) -> None:
        """num_rows: of the inputs that will come."""
        self._gatherers = {
            key: Gatherer(
                layer.weights[key].shape[1],
                num_rows,
                layer.weights[key].device,
                hessian=methods.needs_hessian(scheme),
            )
            for key, scheme in schemes.items()
            if methods.needs_calibration(scheme)
        }

    def add(self, key: str, x: Tensor) -> None:
        if key in self._gatherers:
            self._gatherers[key].add(x)

    def run(self, forward: LayerForward, layer: FloatLayer, hidden: Tensor, batch: int) -> None:
        """Pass hidden [N, length, H] through the layer, ``batch`` sequences at once."""
        last = LAYER_MODULES[-1]

        def product(key: str, x: Tensor) -> Tensor:
            self.add(key, x)
            # Nobody reads what the last one would compute.
            return x.new_zeros(()) if key == last else layer.product(key, x)

        if self._gatherers:
            for part in hidden.split(batch):
                forward(layer, part, product)

    def statistics(self) -> dict[str, InputStatistics]:
        return {key: gatherer.result() for key, gatherer in self._gatherers.items()}


def quantize_layer(
    layer: FloatLayer, config: ModelConfig, schemes: Schemes, statistics: Mapping[str, InputStatistics]
) -> QuantizedLayer:
    """Quantize what has a scheme. ``layer`` gets what scales change in norms, biases and other weights."""
    result, known = QuantizedLayer(), dict(statistics)
    for key, scheme in schemes.items():
        if scheme is None or not methods.scales_inputs(scheme):
            continue
        scales = methods.search_scales(scheme, layer.weights[key], known[key])
        folded = fold_scales(layer, config, key, share_scales(config, key, scales))
        known[key] = known[key].divided_by(folded.inputs)
        result.input_scales[key] = folded.inputs
        if folded.source is not None and folded.outputs is not None:
            result.output_scales[folded.source] = folded.outputs
    for key, scheme in schemes.items():
        if scheme is not None:
            weight = methods.quantize(scheme, layer.weights[key], known.get(key))
            result.weights[key] = weight
            result.errors[key] = methods.relative_error(layer.weights[key], weight, known.get(key))
    return result


def quantized_product(layer: FloatLayer, quantized: QuantizedLayer, dtype: torch.dtype) -> Product:
    """The products of a layer after ``quantize_layer``, inputs rounded as the kernels round them."""
    weights = {key: weight.dequantize(dtype) for key, weight in quantized.weights.items()}

    def product(key: str, x: Tensor) -> Tensor:
        if key not in weights:
            return layer.product(key, x)
        rounded = methods.rounded_input(quantized.weights[key], x)
        return torch.nn.functional.linear(rounded, weights[key], layer.biases.get(key))

    return product
