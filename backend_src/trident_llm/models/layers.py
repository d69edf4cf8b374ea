"""What decoders are made of, and how checkpoint tensors reach it. Knows no particular model.

A layer is a plain object that holds tensors: at 30 layers a token, the calls of torch.nn.Module would show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LoadFailed
from ..kernels import Kernels
from ..kernels.lora_layer import LoraLayer, LoraRows
from ..kernels.quantized_rows import Rows
from ..kernels.quantized_weight import QuantizedWeight, stack


class Linear:
    """y = x W^T + b. The weight is packed for the device when it is set.

    Where the calls take ``adapters``, y is that plus what these rows take of the layer's low-rank updates.
    """

    __slots__ = ("_kernels", "_linear", "bias", "input_scales", "lora", "output_scales", "weight")
    WEIGHTS = ("weight", "bias", "input_scales", "output_scales")
    """Attributes that come from the model's weights."""

    weight: Any
    """As the device's kernels pack it."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._linear = kernels.linear
        self.bias: Tensor | None = None
        self.input_scales: Tensor | None = None
        """[in]: quantization multiplied the weight's columns by them, and x comes divided by them."""
        self.output_scales: Tensor | None = None
        """[out]: what y comes divided by, because the layer that reads it expects so."""
        self.lora: LoraLayer | None = None
        """The updates; None where there can be none."""

    def set_weight(self, weight: Tensor | QuantizedWeight) -> None:
        """weight: [out, in]."""
        self.weight = self._kernels.pack_linear(weight)

    def set_bias(self, bias: Tensor) -> None:
        """bias: [out]."""
        self.bias = bias

    def input_codes(self, num_rows: int, dtype: torch.dtype) -> torch.dtype | None:
        """The 8-bit dtype to which x [num_rows, in] of ``dtype`` is brought, if it is. See ``Kernels``."""
        return self._kernels.input_codes(self.weight, num_rows, dtype)

    def __call__(self, x: Rows, adapters: LoraRows | None = None) -> Tensor:
        if adapters is not None and self.lora is not None:
            assert isinstance(x, Tensor)
            return self._kernels.linear_lora(x, self.weight, self.bias, self.lora, adapters)
        return self._linear(x, self.weight, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """x W^T, whatever the bias and the updates."""
        return self._linear(x, self.weight, None)

    def silu_and_mul(self, x: Rows, reader: Linear, adapters: LoraRows | None = None) -> Rows:
        """silu(gate) * up of this layer's outputs, gate first: [T, out / 2], as ``reader`` may have it."""
        if adapters is not None and self.lora is not None:
            assert isinstance(x, Tensor)
            return self._kernels.linear_lora_silu_and_mul(x, self.weight, self.bias, self.lora, adapters)
        # Updates read 16 bits, and so do the layers they belong to.
        codes = reader.input_codes(x.shape[0], x.dtype) if adapters is None else None
        return self._kernels.linear_silu_and_mul(x, self.weight, self.bias, codes)

    def add_rms_norm(
        self,
        x: Rows,
        residual: Tensor,
        norm_weight: Tensor,
        eps: float,
        reader: Linear | None,
        adapters: LoraRows | None = None,
    ) -> Rows:
        """Add this layer's outputs to residual [T, out] in place; the norm of the sum, [T, out].

        As ``reader`` may have it; a tensor if that is None.
        """
        if adapters is not None and self.lora is not None:
            assert isinstance(x, Tensor)
            return self._kernels.linear_lora_add_rms_norm(
                x, self.weight, self.bias, residual, norm_weight, eps, self.lora, adapters
            )
        codes = None
        if reader is not None and adapters is None:
            codes = reader.input_codes(residual.shape[0], residual.dtype)
        return self._kernels.linear_add_rms_norm(x, self.weight, self.bias, residual, norm_weight, eps, codes)


@dataclass(frozen=True)
class AdaptableLinear:
    """A linear layer that adapters may update."""

    linear: Linear
    parts: Mapping[str, int]
    """Outputs of each of the checkpoint's modules that it stands for, by full name, in the order they are stacked."""
    num_inputs: int


@dataclass(frozen=True)
class WeightTarget:
    """A tensor of the model, made of one or more checkpoint tensors stacked along dimension 0."""

    parts: Mapping[str, tuple[int, ...]]
    """Shapes by checkpoint name, in the order they are stacked."""
    install: Callable[[Any], None]
    """Called with the whole once all parts are there: a tensor, or a QuantizedWeight for a linear layer."""


def load_targets(
    targets: Iterable[WeightTarget],
    weights: Iterable[tuple[str, Tensor | QuantizedWeight]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Copy each checkpoint tensor to its place as it comes and install what is complete.

    At any time only the tensors whose parts have not all come yet exist beside the installed ones. Raises
    ``LoadFailed`` for a name that is unknown or comes twice, a wrong shape, and missing tensors.
    """
    builders = {name: builder for builder in map(_Builder, targets) for name in builder.target.parts}
    for name, tensor in weights:
        if name not in builders:
            raise LoadFailed(f"model: tensor {name!r} has no place in this model, or came twice")
        builders.pop(name).add(name, tensor, dtype, device)
    if builders:
        raise LoadFailed(f"model: {len(builders)} tensors are missing, the first is {next(iter(builders))!r}")


class _Builder:
    """Fills one target."""

    def __init__(self, target: WeightTarget) -> None:
        self.target = target
        self._missing = len(target.parts)
        self._rows: dict[str, slice] = {}
        self._num_rows = 0
        for name, shape in target.parts.items():
            self._rows[name] = slice(self._num_rows, self._num_rows + shape[0])
            self._num_rows += shape[0]
        self._buffer: Tensor | None = None
        self._quantized: dict[str, QuantizedWeight] = {}

    def add(self, name: str, value: Tensor | QuantizedWeight, dtype: torch.dtype, device: torch.device) -> None:
        """Take one part, and install the whole with the last one."""
        shape = self.target.parts[name]
        if tuple(value.shape) != shape:
            raise LoadFailed(f"model: tensor {name!r} has shape {list(value.shape)}, the config says {list(shape)}")
        if isinstance(value, QuantizedWeight):
            self._quantized[name] = value
        else:
            self._copy(name, value, dtype, device)
        self._missing -= 1
        if not self._missing:
            self.target.install(self._whole(dtype, device))
            self._buffer, self._quantized = None, {}

    def _copy(self, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._buffer is None:
            self._buffer = torch.empty((self._num_rows, *tensor.shape[1:]), dtype=dtype, device=device)
        self._buffer[self._rows[name]].copy_(tensor)
        return self._buffer

    def _whole(self, dtype: torch.dtype, device: torch.device) -> Tensor | QuantizedWeight:
        """Parts of one format stay quantized; others, as one matrix, can only be in full precision."""
        parts = [self._quantized[name] for name in self.target.parts if name in self._quantized]
        if len(parts) == len(self.target.parts) and all(part.same_format(parts[0]) for part in parts):
            return stack(parts)
        for name, part in self._quantized.items():
            self._copy(name, part.dequantize(), dtype, device)
        assert self._buffer is not None
        return self._buffer
