"""The in-situ walk: layers are read, calibrated, quantized and handed on one at a time.

A layer's inputs are those that the quantized layers before it make, so each makes up for the errors of those. At any
time one layer exists in full precision, beside what has been quantized and the calibration text's activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.model_config import ModelConfig
from ..models.weights import WeightReader
from . import methods
from .float_layer import FloatLayer, LayerForward, read_layer, read_merged
from .installation import HEAD_WEIGHT, Parameter
from .layer import Calibration, QuantizedLayer, quantize_layer, quantized_product
from .model_loss import HeadLoss
from .modules import HEAD, LAYER_MODULES, head_module, modules_of_layer
from .scheme import LinearScheme, Plan

Progress = Callable[[str], None]

_BATCH_TOKENS = {"cpu": 4096}
"""Tokens that pass through a layer at once."""
_MANY_TOKENS = 16384


@dataclass(frozen=True)
class QuantizedLinear:
    """What became of one linear layer."""

    name: str
    scheme: LinearScheme
    error: float
    """Relative, of the layer's output on calibration text; of its weight where no text was needed."""


def batch_size(device: torch.device, length: int) -> int:
    """Sequences of ``length`` tokens that pass through a layer at once."""
    return max(_BATCH_TOKENS.get(device.type, _MANY_TOKENS) // length, 1)


class Walk:
    """Goes through a model once.

    samples, held_out: [N, length] token ids. Methods of the plan that calibrate need ``samples``; with ``held_out``
    the loss of the quantized model on these is measured on the way.
    """

    def __init__(
        self,
        reader: WeightReader,
        config: ModelConfig,
        plan: Plan,
        *,
        max_model_len: int,
        embedding: Tensor,
        samples: Tensor | None,
        progress: Progress,
        held_out: Tensor | None = None,
    ) -> None:
        self._reader = reader
        self._config = config
        self._plan = plan
        self._embedding = embedding
        self._progress = progress
        self.results: list[QuantizedLinear] = []
        self.held_out_loss: float | None = None
        """Mean negative log-likelihood of a token of ``held_out``, once all parameters have come."""
        layers = range(config.num_hidden_layers)
        calibrated = [index for index in layers if any(map(methods.needs_calibration, self._schemes(index)))]
        self._last = config.num_hidden_layers if held_out is not None else max(calibrated, default=-1)
        """The last layer whose input must be known."""
        self._samples = samples if calibrated else None
        self._held_out = held_out
        tokens = self._samples if self._samples is not None else held_out
        if tokens is not None:
            self._batch = batch_size(embedding.device, tokens.shape[1])
            self._forward = LayerForward(
                config,
                length=tokens.shape[1],
                max_model_len=max_model_len,
                dtype=embedding.dtype,
                device=embedding.device,
            )

    @torch.no_grad()
    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Everything that is not as the checkpoint has it, by ``Installer``'s names."""
        head_scheme, head, head_weight = self._plan[HEAD], head_module(self._config), None
        if head_scheme is not None:
            weight = read_merged(self._reader, head, "weight")
            head_weight = methods.quantize(head_scheme, weight, None)
            error = methods.relative_error(weight, head_weight, None)
            self.results.append(QuantizedLinear(HEAD, head_scheme, error))
            yield HEAD_WEIGHT, head_weight
        calibration, held_out = self._embedded(self._samples), self._embedded(self._held_out)
        began, num_layers = time.monotonic(), self._config.num_hidden_layers
        for index in range(num_layers):
            if any(self._schemes(index)) or index < self._last:
                yield from self._layer(index, calibration, held_out)
            self._report(index, (time.monotonic() - began) / (index + 1) * (num_layers - index - 1))
        if self._held_out is not None and held_out is not None:
            loss = HeadLoss(self._reader, self._config, head_weight)
            self.held_out_loss = loss.mean(held_out, self._held_out)

    def _schemes(self, index: int) -> list[LinearScheme | None]:
        return [self._plan[module.name] for module in modules_of_layer(self._config, index)]

    def _embedded(self, tokens: Tensor | None) -> Tensor | None:
        return None if tokens is None else F.embedding(tokens.to(self._embedding.device), self._embedding)

    def _layer(
        self, index: int, calibration: Tensor | None, held_out: Tensor | None
    ) -> Iterator[tuple[str, Parameter]]:
        """Quantize a layer. calibration, held_out: [N, length, H], its inputs, become its outputs."""
        layer = read_layer(self._reader, self._config, index)
        schemes = dict(zip(LAYER_MODULES, self._schemes(index), strict=True))
        original = layer.parameters()
        gathering = Calibration(layer, schemes, 0 if calibration is None else calibration[..., 0].numel())
        if calibration is not None:
            gathering.run(self._forward, layer, calibration, self._batch)
        quantized = quantize_layer(layer, self._config, schemes, gathering.statistics())
        yield from self._changed(index, layer, quantized, original)
        if index < self._last:
            product = quantized_product(layer, quantized, self._embedding.dtype)
            for hidden in (calibration, held_out):
                for batch in () if hidden is None else hidden.split(self._batch):
                    batch.copy_(self._forward(layer, batch, product))

    def _changed(
        self, index: int, layer: FloatLayer, quantized: QuantizedLayer, original: dict[str, Tensor]
    ) -> Iterator[tuple[str, Parameter]]:
        """original: the parameters that the layer had at first."""
        modules = dict(zip(LAYER_MODULES, modules_of_layer(self._config, index), strict=True))
        for key, module in modules.items():
            if key in quantized.weights:
                yield f"{module.name}.weight", quantized.weights[key]
                scheme = self._plan[module.name]
                assert scheme is not None
                self.results.append(QuantizedLinear(module.name, scheme, quantized.errors[key]))
            if key in quantized.input_scales:
                yield f"{module.name}.input_scales", quantized.input_scales[key]
            if key in quantized.output_scales:
                yield f"{module.name}.output_scales", quantized.output_scales[key]
        for name, tensor in layer.parameters().items():
            owner, _, kind = name.rpartition(".")
            if tensor is not original[name] and not (kind == "weight" and owner in quantized.weights):
                yield f"{modules[owner].name if owner in modules else owner}.{kind}", tensor.to(self._embedding.dtype)

    def _report(self, index: int, seconds_left: float) -> None:
        done = [result for result in self.results if f".layers.{index}." in result.name]
        schemes = " and ".join(dict.fromkeys(str(result.scheme) for result in done)) or "full precision"
        error = f", error {100 * max(result.error for result in done):.2f}%" if done else ""
        self._progress(
            f"quantizing layer {index + 1} of {self._config.num_hidden_layers}: {schemes}{error}, "
            f"{seconds_left:.0f} s left"
        )
