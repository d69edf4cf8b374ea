"""Brings activations to 8 bits, a scale per row, in the column order of ``PackedBytes``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous
from .packed_bytes import BLOCK
from .quantized_rows import QuantizedRows, allocate_rows

SMALLEST = 1e-12
"""The largest number of a row counts as at least this: rows of zeros have a scale too."""


@triton.jit
def row_scale(largest, smallest, limit):
    return tl.maximum(largest, smallest) / limit


@triton.jit
def round_codes(values, limit, dtype: tl.constexpr):
    """values: float32, divided by their rows' scales -> numbers of an 8-bit dtype."""
    if dtype == tl.int8:
        # Halves to even, as torch rounds: adding and taking away 1.5 * 2**23 leaves no bits for fractions.
        values = (values + 12582912.0) - 12582912.0
    else:
        values = tl.minimum(tl.maximum(values, -limit), limit)
    return values.to(dtype)


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
    scale = row_scale(largest, smallest, limit)
    tl.store(scales + row, scale)
    codes = round_codes(tl.interleave(first / scale, second / scale), limit, values.dtype.element_ty)
    targets = blocks * 2 * HALF + tl.arange(0, 2 * HALF)[None, :]
    tl.store(values + row * NUM_BLOCKS * 2 * HALF + targets, codes, mask=blocks < NUM_BLOCKS)


def quantize_rows(x: Tensor, dtype: torch.dtype, *, pdl: bool = False) -> QuantizedRows:
    """x [T, in] as int8 or float8_e4m3fn: the largest number of a row becomes the limit of the dtype."""
    check_dtype("x", x, FLOAT_DTYPES)
    check_last_contiguous("x", x)
    num_rows, num_inputs = x.shape
    num_blocks = triton.cdiv(num_inputs, BLOCK)
    rows = allocate_rows(num_rows, num_inputs, dtype, dtype=x.dtype, device=x.device)
    if num_rows:
        _quantize_rows_kernel[(num_rows,)](
            x, rows.values, rows.scales, x.stride(0), rows.limit, SMALLEST,
            NUM_INPUTS=num_inputs, NUM_BLOCKS=num_blocks, PADDED_BLOCKS=triton.next_power_of_2(num_blocks),
            HALF=BLOCK // 2, PDL=pdl, num_warps=8 if num_inputs > 4096 else 4, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return rows
