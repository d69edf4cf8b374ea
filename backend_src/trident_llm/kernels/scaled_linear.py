"""Linear layers of 8-bit weights whose activations are brought to 8 bits too: which kernel multiplies how many rows.

For very few rows reading the weight decides, so activations stay as they are and nothing is lost on them. With more,
norms and SiLU write 8 bits themselves for a layer of this kind; what comes in 16 bits is brought to 8 here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import scaled_matmul_hopper
from .packed_bytes import PackedBytes
from .packed_linear import PackedLinear, takes_vectors
from .quantize_rows import quantize_rows
from .quantized_rows import QuantizedRows, Rows
from .scaled_matmul import scaled_matmul
from .scaled_matmul_hopper import HopperScaledConfig
from .scaled_matmul_hopper import scaled_matmul_hopper as multiply_hopper
from .silu_and_quantize import MAX_SIZE, silu_and_quantize
from .sum_parts import sum_parts

_MANY_ROWS = 64
"""With more rows of e4m3 cuBLAS multiplies: 1,200 TFLOP/s at 2,048 rows of Mistral-7B on an H100, 600 to 850 at 256."""


class ScaledLinear(PackedLinear[PackedBytes]):
    """Implements ``PackedLinear``. hopper_processors: as in ``QuantizedLinear``."""

    def __init__(self, *, pdl: bool, hopper_processors: int | None = None) -> None:
        super().__init__(pdl=pdl)
        self._hopper_processors = hopper_processors

    def input_codes(self, weight: PackedBytes, num_rows: int, dtype: torch.dtype) -> torch.dtype | None:
        return None if takes_vectors(num_rows, dtype, weight) else weight.codes.dtype

    def silu_and_mul(
        self, x: Rows, weight: PackedBytes, bias: Tensor | None, codes: torch.dtype | None = None
    ) -> Rows:
        few = isinstance(x, Tensor) and self._takes_vectors(x, weight)
        if codes is None or few or weight.shape[0] // 2 > MAX_SIZE:
            return super().silu_and_mul(x, weight, bias)
        return silu_and_quantize(self._matrix(x, weight, bias), codes, pdl=self._pdl)

    def _matrix(self, x: Rows, weight: PackedBytes, bias: Tensor | None) -> Tensor:
        rows = self._quantized(x, weight)
        if weight.codes.dtype == torch.float8_e4m3fn and x.dtype == torch.bfloat16 and x.shape[0] > _MANY_ROWS:
            return torch._scaled_mm(
                rows.values, weight.codes.t(), scale_a=rows.scales[:, None], scale_b=weight.scales[None, :], bias=bias,
                out_dtype=x.dtype,
            )  # fmt: skip
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=rows.values.device)
        config = self._hopper_config(rows, weight)
        if config is None:
            scaled_matmul(rows, weight, out, bias=bias, pdl=self._pdl)
        elif config.num_splits == 1:
            self._multiply_hopper(rows, weight, out, config, bias)
        else:
            sum_parts(self._parts(rows, weight, config), out, bias=bias, pdl=self._pdl)
        return out

    def product(self, x: Rows, weight: PackedBytes, bias: Tensor | None) -> Tensor:
        if bias is None and not (isinstance(x, Tensor) and self._takes_vectors(x, weight)):
            rows = self._quantized(x, weight)
            config = self._hopper_config(rows, weight)
            if config is not None and config.num_splits > 1:
                return self._parts(rows, weight, config)
            x = rows
        return self.linear(x, weight, bias)

    def _quantized(self, x: Rows, weight: PackedBytes) -> QuantizedRows:
        return x if isinstance(x, QuantizedRows) else quantize_rows(x, weight.codes.dtype, pdl=self._pdl)

    def _hopper_config(self, rows: QuantizedRows, weight: PackedBytes) -> HopperScaledConfig | None:
        """Where Hopper's own kernel multiplies."""
        if self._hopper_processors is None or weight.codes.dtype != torch.int8 or rows.shape[0] == 0:
            return None
        return scaled_matmul_hopper.default_config(weight, rows.shape[0], self._hopper_processors)

    def _parts(self, rows: QuantizedRows, weight: PackedBytes, config: HopperScaledConfig) -> Tensor:
        """[num_splits, T, out] float32."""
        shape = (config.num_splits, rows.shape[0], weight.shape[0])
        parts = torch.empty(shape, dtype=torch.float32, device=rows.values.device)
        self._multiply_hopper(rows, weight, parts, config, None)
        return parts

    def _multiply_hopper(
        self, rows: QuantizedRows, weight: PackedBytes, out: Tensor, config: HopperScaledConfig, bias: Tensor | None
    ) -> None:
        assert self._hopper_processors is not None
        multiply_hopper(
            rows, weight, out, bias=bias, num_processors=self._hopper_processors, config=config, pdl=self._pdl
        )  # fmt: skip
