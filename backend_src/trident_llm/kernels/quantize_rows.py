"""Brings activations to 8 bits, a scale per row, in the column order of ``PackedBytes``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous
from .layer_cache import SCALED_LIMITS
from .packed_bytes import BLOCK

_SMALLEST = 1e-12


@dataclass(frozen=True)
class QuantizedRows:
    values: Tensor
    """[T, in padded to whole blocks] int8 or float8_e4m3fn."""
    scales: Tensor
    """[T] float32."""


@triton.jit
def _quantize_rows_kernel(
    x,  # [num_rows, NUM_INPUTS]
    values,  # [num_rows, NUM_BLOCKS * 2 * HALF]
    scales,  # [num_rows] float32
    stride_x,
    limit,
    smallest,
    NUM_INPUTS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, PADDED_BLOCKS)[:, None]
    columns = blocks * 2 * HALF + tl.arange(0, HALF)[None, :]
    first = tl.load(x + row * stride_x + columns, mask=columns < NUM_INPUTS, other=0.0).to(tl.float32)
    second = tl.load(x + row * stride_x + columns + HALF, mask=columns + HALF < NUM_INPUTS, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1), 0)
    scale = tl.maximum(largest, smallest) / limit
    tl.store(scales + row, scale)
    both = tl.interleave(first / scale, second / scale)
    if values.dtype.element_ty == tl.int8:
        # Halves to even, as torch rounds: adding and taking away 1.5 * 2**23 leaves no bits for fractions.
        both = (both + 12582912.0) - 12582912.0
    else:
        both = tl.minimum(tl.maximum(both, -limit), limit)
    targets = blocks * 2 * HALF + tl.arange(0, 2 * HALF)[None, :]
    target = values + row * NUM_BLOCKS * 2 * HALF + targets
    tl.store(target, both.to(values.dtype.element_ty), mask=blocks < NUM_BLOCKS)


def quantize_rows(x: Tensor, dtype: torch.dtype, *, pdl: bool = False) -> QuantizedRows:
    """x [T, in] as int8 or float8_e4m3fn: the largest number of a row becomes the limit of the dtype."""
    check_dtype("x", x, FLOAT_DTYPES)
    check_last_contiguous("x", x)
    num_rows, num_inputs = x.shape
    num_blocks = triton.cdiv(num_inputs, BLOCK)
    rows = QuantizedRows(
        values=torch.empty(num_rows, num_blocks * BLOCK, dtype=dtype, device=x.device),
        scales=torch.empty(num_rows, dtype=torch.float32, device=x.device),
    )
    if num_rows:
        _quantize_rows_kernel[(num_rows,)](
            x, rows.values, rows.scales, x.stride(0), SCALED_LIMITS[dtype], _SMALLEST,
            NUM_INPUTS=num_inputs, NUM_BLOCKS=num_blocks, PADDED_BLOCKS=triton.next_power_of_2(num_blocks),
            HALF=BLOCK // 2, PDL=pdl, num_warps=8 if num_inputs > 4096 else 4, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return rows
