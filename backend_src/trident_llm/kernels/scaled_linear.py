"""Linear layers of 8-bit weights whose activations are brought to 8 bits too: which kernel multiplies how many rows.

For very few rows reading the weight decides, so activations stay as they are and nothing is lost on them. With more,
norms and SiLU write 8 bits themselves for a layer of this kind; what comes in 16 bits is brought to 8 here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import scaled_matmul, scaled_matmul_hopper
from .packed_bytes import PackedBytes
from .packed_linear import PackedLinear, takes_vectors
from .quantize_rows import quantize_rows
from .quantized_rows import QuantizedRows, Rows
from .scaled_matmul import ScaledConfig
from .scaled_matmul import scaled_matmul as multiply
from .scaled_matmul_hopper import HopperScaledConfig
from .scaled_matmul_hopper import scaled_matmul_hopper as multiply_hopper
from .silu_and_quantize import MAX_SIZE, silu_and_quantize

_MANY_ROWS = 64
"""With more rows of e4m3 cuBLAS multiplies: 1,200 TFLOP/s at 2,048 rows of Mistral-7B on an H100, 600 to 850 at 256."""


class ScaledLinear(PackedLinear[PackedBytes]):
    """Implements ``PackedLinear``. hopper_processors: as in ``QuantizedLinear``."""

    def __init__(self, *, pdl: bool, hopper_processors: int = 0) -> None:
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
        return self._whole(rows, weight, self._config(rows, weight), bias)

    def product(self, x: Rows, weight: PackedBytes, bias: Tensor | None) -> Tensor:
        if bias is None and not (isinstance(x, Tensor) and self._takes_vectors(x, weight)):
            x = self._quantized(x, weight)
            config = self._config(x, weight)
            if config.num_splits > 1:
                return self._parts(x, weight, config)
        return self.linear(x, weight, bias)

    def _quantized(self, x: Rows, weight: PackedBytes) -> QuantizedRows:
        return x if isinstance(x, QuantizedRows) else quantize_rows(x, weight.codes.dtype, pdl=self._pdl)

    def _config(self, rows: QuantizedRows, weight: PackedBytes) -> ScaledConfig | HopperScaledConfig:
        num_rows = rows.shape[0]
        if self._hopper_processors > 0 and weight.codes.dtype == torch.int8 and num_rows > 0:
            return scaled_matmul_hopper.default_config(weight, num_rows, self._hopper_processors)
        return scaled_matmul.default_config(num_rows)

    def _multiply(
        self,
        x: QuantizedRows,
        weight: PackedBytes,
        out: Tensor,
        config: ScaledConfig | HopperScaledConfig,
        *,
        bias: Tensor | None = None,
    ) -> None:
        if isinstance(config, ScaledConfig):
            multiply(x, weight, out, bias=bias, config=config, pdl=self._pdl)
        else:
            multiply_hopper(
                x, weight, out, bias=bias, num_processors=self._hopper_processors, config=config, pdl=self._pdl
            )  # fmt: skip
