"""Linear layers with packed weights in the Triton language: which kernel multiplies how many rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import quantized_matmul, quantized_matmul_hopper, quantized_vector
from .checks import HALF_DTYPES
from .packed_linear import PackedLinear
from .packed_weight import PANEL, PackedWeight
from .quantized_matmul import QuantizedConfig
from .quantized_matmul import quantized_matmul as multiply
from .quantized_matmul_hopper import HopperMatmulConfig
from .quantized_matmul_hopper import quantized_matmul_hopper as multiply_hopper
from .unpack_weight import unpack_weight

_MANY_OUTPUTS = 16_384
"""From so many on, tiles of whole sums keep a large GPU busy."""


class QuantizedLinear(PackedLinear[PackedWeight]):
    """Implements ``PackedLinear``. hopper_processors: multiprocessors of a device of compute capability 9.0, 0 on
    others. use_asm: off where there is no GPU."""

    def __init__(self, *, pdl: bool, hopper_processors: int = 0, use_asm: bool = True) -> None:
        super().__init__(pdl=pdl)
        self._hopper_processors = hopper_processors
        self._use_asm = use_asm

    def _takes_vectors(self, x: Tensor, weight: PackedWeight) -> bool:
        if weight.input_order is not None or not super()._takes_vectors(x, weight):
            return False
        return x.shape[0] <= quantized_vector.MAX_SHARED_ROWS or not self._is_hoppers(x, weight)

    def _is_hoppers(self, x: Tensor, weight: PackedWeight) -> bool:
        """Whether Hopper's own kernel multiplies more than a few rows."""
        few = 1 <= x.shape[0] <= quantized_matmul_hopper.MAX_ROWS
        return self._hopper_processors > 0 and few and quantized_matmul_hopper.takes(x, weight)

    def _config(
        self, x: Tensor, weight: PackedWeight, *, silu_and_mul: bool = False
    ) -> QuantizedConfig | HopperMatmulConfig | None:
        """Of the kernel that unpacks in registers; None where the weight is unpacked to memory."""
        num_rows, num_outputs = x.shape[0], weight.num_outputs
        if silu_and_mul and num_rows > quantized_matmul.MAX_SILU_ROWS:
            return None
        if self._is_hoppers(x, weight) and not (silu_and_mul and num_outputs % (2 * PANEL)):
            return quantized_matmul_hopper.default_config(
                weight, num_rows, self._hopper_processors, silu_and_mul=silu_and_mul
            )
        if x.dtype not in HALF_DTYPES or not 1 <= num_rows <= quantized_matmul.MAX_ROWS:
            return None
        if silu_and_mul:
            return quantized_matmul.default_config(num_rows, num_outputs // 2, silu_and_mul=True)
        return quantized_matmul.default_config(num_rows, num_outputs, may_split=num_outputs < _MANY_OUTPUTS)

    def _matrix(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        config = self._config(x, weight)
        if config is None:
            return F.linear(_in_order(x, weight), self._unpacked(weight, x.dtype), bias)
        return self._whole(x, weight, config, bias)

    def _matrix_silu_and_mul(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        config = self._config(x, weight, silu_and_mul=True)
        if bias is not None or config is None:
            return super()._matrix_silu_and_mul(x, weight, bias)
        out = x.new_empty(x.shape[0], weight.num_outputs // 2)
        self._multiply(x, weight, out, config, silu_and_mul=True)
        return out

    def product(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        few = x.shape[0] <= quantized_vector.MAX_SHARED_ROWS and self._takes_vectors(x, weight)
        if bias is None and not few:
            config = self._config(x, weight)
            if config is not None and config.num_splits > 1:
                return self._parts(x, weight, config)
        return self.linear(x, weight, bias)

    def _multiply(
        self,
        x: Tensor,
        weight: PackedWeight,
        out: Tensor,
        config: QuantizedConfig | HopperMatmulConfig,
        *,
        bias: Tensor | None = None,
        silu_and_mul: bool = False,
    ) -> None:
        x = _in_order(x, weight)
        if isinstance(config, QuantizedConfig):
            multiply(
                x, weight, out, bias=bias, silu_and_mul=silu_and_mul, config=config, pdl=self._pdl,
                use_asm=self._use_asm,
            )  # fmt: skip
        else:
            multiply_hopper(
                x, weight, out, bias=bias, silu_and_mul=silu_and_mul, num_processors=self._hopper_processors,
                config=config, pdl=self._pdl,
            )  # fmt: skip

    def _unpacked(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        unpacked = torch.empty(weight.shape, dtype=dtype, device=weight.low.device)
        unpack_weight(weight, unpacked, pdl=self._pdl, use_asm=self._use_asm)
        return unpacked


def _in_order(x: Tensor, weight: PackedWeight) -> Tensor:
    return x if weight.input_order is None else x.index_select(1, weight.input_order)
