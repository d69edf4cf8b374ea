"""What linear layers with packed weights have in common: very few rows, and the norm that follows.

The operations and their meanings are those of ``Kernels``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from . import quantized_vector
from .checks import HALF_DTYPES
from .packed_bytes import PackedBytes
from .packed_weight import PackedWeight
from .quantized_rows import Rows, allocate_rows
from .quantized_vector import quantized_vector as multiply_vector
from .rms_norm import rms_norm
from .silu_and_mul import silu_and_mul
from .sum_parts import sum_parts

Packed = TypeVar("Packed", PackedWeight, PackedBytes)


class PackedLinear(ABC, Generic[Packed]):
    """Holds no tensors. pdl: whether the device knows programmatic dependent launch."""

    def __init__(self, *, pdl: bool) -> None:
        self._pdl = pdl

    def input_codes(self, weight: Packed, num_rows: int, dtype: torch.dtype) -> torch.dtype | None:
        del weight, num_rows, dtype
        return None

    def linear(self, x: Rows, weight: Packed, bias: Tensor | None) -> Tensor:
        if isinstance(x, Tensor) and self._takes_vectors(x, weight):
            return self._vector(x, weight, weight.shape[0], bias=bias)
        return self._matrix(x, weight, bias)

    def silu_and_mul(self, x: Rows, weight: Packed, bias: Tensor | None, codes: torch.dtype | None = None) -> Rows:
        del codes
        if bias is None and isinstance(x, Tensor) and self._takes_vectors(x, weight):
            return self._vector(x, weight, weight.shape[0] // 2, silu_and_mul=True)
        return self._matrix_silu_and_mul(x, weight, bias)

    def add_rms_norm(
        self,
        x: Rows,
        weight: Packed,
        bias: Tensor | None,
        residual: Tensor,
        norm_weight: Tensor,
        eps: float,
        codes: torch.dtype | None = None,
    ) -> Rows:
        out: Rows
        if codes is None:
            out = torch.empty_like(residual)
        else:
            num_rows, size = residual.shape
            out = allocate_rows(num_rows, size, codes, dtype=residual.dtype, device=residual.device)
        rms_norm(self.product(x, weight, bias), norm_weight, eps, out, residual=residual, pdl=self._pdl)
        return out

    @abstractmethod
    def _matrix(self, x: Any, weight: Packed, bias: Tensor | None) -> Tensor:
        """``linear`` of rows that the kernel for very few does not take. x: as ``input_codes`` allows."""

    def _matrix_silu_and_mul(self, x: Any, weight: Packed, bias: Tensor | None) -> Tensor:
        gate_up = self._matrix(x, weight, bias)
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        silu_and_mul(gate_up, out, pdl=self._pdl)
        return out

    def product(self, x: Any, weight: Packed, bias: Tensor | None) -> Tensor:
        """``linear``, perhaps in parts that the norm adds up: [T, out] or [P, T, out] float32."""
        return self.linear(x, weight, bias)

    @abstractmethod
    def _multiply(self, x: Any, weight: Packed, out: Tensor, config: Any, *, bias: Tensor | None = None) -> None:
        """One launch of the kernel that ``config`` belongs to, into out [T, out], or [num_splits, T, out] float32."""

    def _whole(self, x: Any, weight: Packed, config: Any, bias: Tensor | None) -> Tensor:
        """``_multiply``, and a second launch where programs share the sums: [T, out]."""
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
        if config.num_splits == 1:
            self._multiply(x, weight, out, config, bias=bias)
        else:
            sum_parts(self._parts(x, weight, config), out, bias=bias, pdl=self._pdl)
        return out

    def _parts(self, x: Any, weight: Packed, config: Any) -> Tensor:
        """[num_splits, T, out] float32."""
        parts = torch.empty(config.num_splits, x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
        self._multiply(x, weight, parts, config)
        return parts

    def _takes_vectors(self, x: Tensor, weight: Packed) -> bool:
        """Whether the kernel for very few rows multiplies."""
        return takes_vectors(x.shape[0], x.dtype, weight)

    def _vector(self, x: Tensor, weight: Packed, num_outputs: int, **options: Any) -> Tensor:
        """One pass of the kernel for very few rows, [T, num_outputs]."""
        out = x.new_empty(x.shape[0], num_outputs)
        multiply_vector(x, weight, out, pdl=self._pdl, **options)
        return out


def takes_vectors(num_rows: int, dtype: torch.dtype, weight: PackedWeight | PackedBytes) -> bool:
    few = 1 <= num_rows <= quantized_vector.MAX_ROWS
    return few and dtype in HALF_DTYPES and quantized_vector.supports(weight)
