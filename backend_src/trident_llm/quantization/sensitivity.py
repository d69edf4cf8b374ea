"""How much each linear layer's quantization costs the whole model, from one pass forward and one back.

To second order, what a change of a layer's output by d adds to the divergence of the next token's distribution is half
of the mean of (g . d) squared, with g the gradient of the log-likelihood of a token drawn from the model itself (the
Fisher information). g comes from one pass back, and d from quantizing the layer on trial. Layers are read one at a
time in both passes; what exists at once is one layer in full precision and every layer's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.model_config import ModelConfig
from ..models.weights import WeightReader
from .float_layer import FloatLayer, LayerForward, read_layer
from .layer import Calibration, Schemes, quantize_layer
from .model_loss import HeadLoss
from .modules import LAYER_MODULES, modules_of_layer
from .scheme import Plan

Progress = Callable[[str], None]

_SEED = 0


class Sensitivity:
    """Measures on ``samples`` [N, length], token ids."""

    def __init__(
        self,
        reader: WeightReader,
        config: ModelConfig,
        *,
        max_model_len: int,
        embedding: Tensor,
        samples: Tensor,
        progress: Progress,
    ) -> None:
        self._reader = reader
        self._config = config
        self._progress = progress
        self._hidden = F.embedding(samples.to(embedding.device), embedding)
        self._forward = LayerForward(
            config,
            length=samples.shape[1],
            max_model_len=max_model_len,
            dtype=embedding.dtype,
            device=embedding.device,
        )

    def measure(self, plan: Plan) -> dict[str, float]:
        """What the scheme that ``plan`` has for each layer costs by itself, in nats a token."""
        costs: dict[str, float] = {}
        for index, layer, gradient in self._backwards():
            modules = dict(zip(LAYER_MODULES, modules_of_layer(self._config, index), strict=True))
            schemes = {key: plan[module.name] for key, module in modules.items()}
            for key, cost in self._layer_costs(layer, schemes, gradient).items():
                costs[modules[key].name] = cost
            done = self._config.num_hidden_layers - index
            self._progress(f"measuring what bits cost: layer {done} of {self._config.num_hidden_layers}")
        return costs

    def _backwards(self) -> Iterator[tuple[int, FloatLayer, dict[str, tuple[Tensor, Tensor]]]]:
        """From the last layer to the first: index, parameters, and input and gradient of each linear layer's output."""
        inputs = [self._hidden]
        for index in range(self._config.num_hidden_layers):
            layer = read_layer(self._reader, self._config, index)
            inputs.append(torch.cat([self._forward(layer, h[None], layer.product) for h in inputs[-1]]))
        head = HeadLoss(self._reader, self._config)
        gradient = head.sampled_gradient(inputs.pop(), torch.Generator().manual_seed(_SEED))
        for index in reversed(range(self._config.num_hidden_layers)):
            layer = read_layer(self._reader, self._config, index)
            captured: dict[str, tuple[list[Tensor], list[Tensor]]] = {key: ([], []) for key in LAYER_MODULES}
            hidden = inputs.pop()
            gradient = torch.stack(
                [self._layer_backward(layer, h, g, captured) for h, g in zip(hidden, gradient, strict=True)]
            )
            yield index, layer, {key: (torch.cat(x), torch.cat(g)) for key, (x, g) in captured.items()}

    def _layer_backward(
        self,
        layer: FloatLayer,
        hidden: Tensor,
        gradient: Tensor,
        captured: dict[str, tuple[list[Tensor], list[Tensor]]],
    ) -> Tensor:
        """gradient [length, H] of a layer's output -> of its input ``hidden``. Appends to ``captured`` [length, in] and
        [length, out] of each linear layer."""
        outputs: dict[str, Tensor] = {}

        def product(key: str, x: Tensor) -> Tensor:
            outputs[key] = layer.product(key, x)
            captured[key][0].append(x.detach()[0])
            return outputs[key]

        with torch.enable_grad():
            leaf = hidden.detach()[None].requires_grad_(True)
            result = self._forward(layer, leaf, product)
            wanted = [leaf, *(outputs[key] for key in LAYER_MODULES)]
            found = torch.autograd.grad(result, wanted, gradient[None].to(result.dtype))
        for key, part in zip(LAYER_MODULES, found[1:], strict=True):
            captured[key][1].append(part[0])
        return found[0][0].float()

    def _layer_costs(
        self, layer: FloatLayer, schemes: Schemes, captured: dict[str, tuple[Tensor, Tensor]]
    ) -> dict[str, float]:
        gathering = Calibration(layer, schemes, next(iter(captured.values()))[0].shape[0])
        for key, (x, _) in captured.items():
            gathering.add(key, x)
        original = dict(layer.weights)
        quantized = quantize_layer(layer, self._config, schemes, gathering.statistics())
        costs = {}
        for key in quantized.weights:
            x, gradient = captured[key]
            difference = quantized.effective_weight(key) - original[key].float()
            changes = ((x.float() @ difference.T) * gradient.float()).sum(-1)
            costs[key] = 0.5 * float(changes.square().mean().item())
        return costs
