"""What linear layers with packed weights have in common: very few rows, and norms that may be left unfinished.

The operations and their meanings are those of ``Kernels``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from . import deferred_norm, quantized_vector
from .checks import HALF_DTYPES
from .deferred_norm import DeferredNorm, finished
from .packed_bytes import PackedBytes
from .packed_weight import PackedWeight
from .quantized_vector import quantized_vector as multiply_vector
from .rms_norm import rms_norm
from .silu_and_mul import silu_and_mul

Packed = TypeVar("Packed", PackedWeight, PackedBytes)


class PackedLinear(ABC, Generic[Packed]):
    """Holds no tensors. pdl: whether the device knows programmatic dependent launch."""

    def __init__(self, *, pdl: bool) -> None:
        self._pdl = pdl

    def linear(self, x: Tensor | DeferredNorm, weight: Packed, bias: Tensor | None) -> Tensor:
        if self._takes_vectors(x, weight):
            return self._vector(x, weight, weight.shape[0], bias=bias)
        return self._matrix(finished(x), weight, bias)

    def silu_and_mul(self, x: Tensor | DeferredNorm, weight: Packed, bias: Tensor | None) -> Tensor:
        if bias is None and self._takes_vectors(x, weight):
            return self._vector(x, weight, weight.shape[0] // 2, silu_and_mul=True)
        return self._matrix_silu_and_mul(finished(x), weight, bias)

    def add_rms_norm(
        self,
        x: Tensor,
        weight: Packed,
        bias: Tensor | None,
        residual: Tensor,
        norm_weight: Tensor,
        eps: float,
        may_defer: bool,
    ) -> Tensor | DeferredNorm:
        if may_defer and x.shape[0] <= deferred_norm.MAX_ROWS and self._takes_vectors(x, weight):
            shape = (x.shape[0], quantized_vector.num_programs(weight))
            squares = torch.empty(shape, dtype=torch.float32, device=x.device)
            values = self._vector(
                x, weight, weight.shape[0], bias=bias, residual=residual, norm_weight=norm_weight, new_squares=squares
            )
            return DeferredNorm(values, squares, eps)
        out = torch.empty_like(residual)
        rms_norm(self._added(x, weight, bias), norm_weight, eps, out, residual=residual, pdl=self._pdl)
        return out

    @abstractmethod
    def _matrix(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """``linear`` of rows that the kernel for very few does not take."""

    def _matrix_silu_and_mul(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        gate_up = self._matrix(x, weight, bias)
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        silu_and_mul(gate_up, out, pdl=self._pdl)
        return out

    def _added(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """``linear``, perhaps in parts that the norm adds up: [T, out] or [P, T, out] float32."""
        return self.linear(x, weight, bias)

    def _takes_vectors(self, x: Tensor | DeferredNorm, weight: Packed) -> bool:
        """Whether the kernel for very few rows multiplies."""
        dtype = x.values.dtype if isinstance(x, DeferredNorm) else x.dtype
        few = 1 <= x.shape[0] <= quantized_vector.MAX_ROWS
        return few and dtype in HALF_DTYPES and quantized_vector.supports(weight)

    def _vector(self, x: Tensor | DeferredNorm, weight: Packed, num_outputs: int, **options: Any) -> Tensor:
        """One pass of the kernel for very few rows, [T, num_outputs]."""
        if isinstance(x, DeferredNorm):
            options.update(squares=x.squares, eps=x.eps)
            x = x.values
        out = x.new_empty(x.shape[0], num_outputs)
        multiply_vector(x, weight, out, pdl=self._pdl, **options)
        return out
