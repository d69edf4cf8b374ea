"""Linear layers of 8-bit weights whose activations are brought to 8 bits too: which kernel multiplies how many rows.

For very few rows reading the weight decides, so activations stay as they are and nothing is lost on them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packed_bytes import PackedBytes
from .packed_linear import PackedLinear
from .quantize_rows import quantize_rows
from .scaled_matmul import scaled_matmul

_MANY_ROWS = 64
"""With more rows of e4m3 cuBLAS multiplies: 1,200 TFLOP/s at 2,048 rows of Mistral-7B on an H100, 600 to 850 at 256."""


class ScaledLinear(PackedLinear[PackedBytes]):
    """Implements ``PackedLinear``."""

    def _matrix(self, x: Tensor, weight: PackedBytes, bias: Tensor | None) -> Tensor:
        rows = quantize_rows(x, weight.codes.dtype, pdl=self._pdl)
        if weight.codes.dtype == torch.float8_e4m3fn and x.dtype == torch.bfloat16 and x.shape[0] > _MANY_ROWS:
            return torch._scaled_mm(
                rows.values, weight.codes.t(), scale_a=rows.scales[:, None], scale_b=weight.scales[None, :], bias=bias,
                out_dtype=x.dtype,
            )  # fmt: skip
        out = x.new_empty(x.shape[0], weight.shape[0])
        scaled_matmul(rows, weight, out, bias=bias, pdl=self._pdl)
        return out
