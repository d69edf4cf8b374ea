"""Linear layers with packed weights in the Triton language: which kernel multiplies how many rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import quantized_matmul, quantized_vector
from .checks import HALF_DTYPES
from .packed_linear import PackedLinear
from .packed_weight import PackedWeight
from .quantized_matmul import QuantizedConfig
from .quantized_matmul import quantized_matmul as multiply
from .sum_parts import sum_parts
from .unpack_weight import unpack_weight

_MANY_OUTPUTS = 16_384
"""From so many on, tiles of whole sums keep a large GPU busy."""


class QuantizedLinear(PackedLinear[PackedWeight]):
    """Implements ``PackedLinear``. use_asm: off where there is no GPU."""

    def __init__(self, *, pdl: bool, use_asm: bool = True) -> None:
        super().__init__(pdl=pdl)
        self._use_asm = use_asm

    def _takes_vectors(self, x: Tensor, weight: PackedWeight) -> bool:
        return weight.input_order is None and super()._takes_vectors(x, weight)

    def _matrix(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        x = _in_order(x, weight)
        if not _streams_weight(x):
            return F.linear(x, self._unpacked(weight, x.dtype), bias)
        out = x.new_empty(x.shape[0], weight.num_outputs)
        config = _config(x.shape[0], weight.num_outputs)
        if config.num_splits == 1:
            multiply(x, weight, out, bias=bias, config=config, pdl=self._pdl, use_asm=self._use_asm)
        else:
            sum_parts(self._parts(x, weight, config), out, bias=bias, pdl=self._pdl)
        return out

    def _matrix_silu_and_mul(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        if bias is not None or not _streams_weight(x) or x.shape[0] > quantized_matmul.MAX_SILU_ROWS:
            return super()._matrix_silu_and_mul(x, weight, bias)
        out = x.new_empty(x.shape[0], weight.num_outputs // 2)
        multiply(_in_order(x, weight), weight, out, silu_and_mul=True, pdl=self._pdl, use_asm=self._use_asm)
        return out

    def product(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        config = _config(x.shape[0], weight.num_outputs)
        few = x.shape[0] <= quantized_vector.MAX_SHARED_ROWS and self._takes_vectors(x, weight)
        if bias is None and _streams_weight(x) and not few and config.num_splits > 1:
            return self._parts(_in_order(x, weight), weight, config)
        return self.linear(x, weight, bias)

    def _parts(self, x: Tensor, weight: PackedWeight, config: QuantizedConfig) -> Tensor:
        """[num_splits, T, out] float32."""
        parts = torch.empty(config.num_splits, x.shape[0], weight.num_outputs, dtype=torch.float32, device=x.device)
        multiply(x, weight, parts, config=config, pdl=self._pdl, use_asm=self._use_asm)
        return parts

    def _unpacked(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        unpacked = torch.empty(weight.shape, dtype=dtype, device=weight.low.device)
        unpack_weight(weight, unpacked, pdl=self._pdl, use_asm=self._use_asm)
        return unpacked


def _config(num_rows: int, num_outputs: int) -> QuantizedConfig:
    return quantized_matmul.default_config(num_rows, num_outputs, may_split=num_outputs < _MANY_OUTPUTS)


def _streams_weight(x: Tensor) -> bool:
    """Whether a kernel that unpacks in registers multiplies; else the weight is unpacked to memory."""
    return x.dtype in HALF_DTYPES and 1 <= x.shape[0] <= quantized_matmul.MAX_ROWS


def _in_order(x: Tensor, weight: PackedWeight) -> Tensor:
    return x if weight.input_order is None else x.index_select(1, weight.input_order)
