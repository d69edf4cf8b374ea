"""What decoders are made of, and how checkpoint tensors reach it. Knows no particular model.

A layer is a plain object that holds tensors: at 30 layers a token, the calls of torch.nn.Module would show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoadFailed
from ..kernels import Kernels


class Linear:
    """y = x W^T + b. The weight is packed for the device when it is set."""

    __slots__ = ("_kernels", "_linear", "bias", "weight")

    weight: Tensor

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._linear = kernels.linear
        self.bias: Tensor | None = None

    def set_weight(self, weight: Tensor) -> None:
        """weight: [out, in]."""
        self.weight = self._kernels.pack_linear(weight)

    def set_bias(self, bias: Tensor) -> None:
        """bias: [out]."""
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x, self.weight, self.bias)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """silu(gate) * up of this layer's outputs, gate first: [T, out / 2]."""
        return self._kernels.linear_silu_and_mul(x, self.weight, self.bias)

    def add_rms_norm(self, x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
        """Add this layer's outputs to residual [T, out] in place; the norm of the sum, [T, out]."""
        return self._kernels.linear_add_rms_norm(x, self.weight, self.bias, residual, norm_weight, eps)


@dataclass(frozen=True)
class WeightTarget:
    """A tensor of the model, made of one or more checkpoint tensors stacked along dimension 0."""

    parts: Mapping[str, tuple[int, ...]]
    """Shapes by checkpoint name, in the order they are stacked."""
    install: Callable[[Tensor], None]
    """Called with the whole tensor once all parts are there."""


def load_targets(
    targets: Iterable[WeightTarget],
    weights: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Copy each checkpoint tensor to its place as it comes and install what is complete.

    At any time only the tensors whose parts have not all come yet exist beside the installed ones. Returns the bytes
    installed. Raises ``LoadFailed`` for a name that is unknown or comes twice, a wrong shape, and missing tensors.
    """
    builders = {name: builder for builder in map(_Builder, targets) for name in builder.target.parts}
    num_bytes = 0
    for name, tensor in weights:
        if name not in builders:
            raise LoadFailed(f"model: tensor {name!r} has no place in this model, or came twice")
        num_bytes += builders.pop(name).add(name, tensor, dtype, device)
    if builders:
        raise LoadFailed(f"model: {len(builders)} tensors are missing, the first is {next(iter(builders))!r}")
    return num_bytes


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

    def add(self, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> int:
        """Copy one part in; returns the bytes installed, 0 while parts are missing."""
        shape = self.target.parts[name]
        if tuple(tensor.shape) != shape:
            raise LoadFailed(f"model: tensor {name!r} has shape {list(tensor.shape)}, the config says {list(shape)}")
        if self._buffer is None:
            self._buffer = torch.empty((self._num_rows, *shape[1:]), dtype=dtype, device=device)
        self._buffer[self._rows[name]].copy_(tensor)
        self._missing -= 1
        if self._missing:
            return 0
        buffer, self._buffer = self._buffer, None
        self.target.install(buffer)
        return buffer.nbytes
