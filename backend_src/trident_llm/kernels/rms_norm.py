"""RMSNorm, optionally with the residual addition before it and 8 bits after it. Zhang and Sennrich 2019.

Knows rows only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape
from .packed_bytes import BLOCK
from .quantize_rows import SMALLEST, round_codes, row_scale
from .quantized_rows import QuantizedRows, Rows, check_rows

_VALUES_PER_PROGRAM = 4096


@dataclass(frozen=True)
class NormConfig:
    rows: int
    """Per program."""
    num_warps: int


def default_config(size: int, num_rows: int) -> NormConfig:
    """The same for 16 and 8 bits: warps decide in which order squares are added up, and so the last bit."""
    padded = triton.next_power_of_2(size)
    rows = max(1, min(_VALUES_PER_PROGRAM // 4 // padded, triton.next_power_of_2(num_rows)))
    return NormConfig(rows, 8 if padded >= _VALUES_PER_PROGRAM else 4)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x,  # [num_rows // inner, inner, size], strides below; [PARTS, num_rows, size] float32 with several parts
    residual,  # [num_rows, size], updated in place; unused unless ADD
    weight,  # [size]
    out,  # [num_rows, size] contiguous; the values of QuantizedRows if QUANTIZE
    row_scales,  # [num_rows] float32; unused unless QUANTIZE
    num_rows,
    inner,
    stride_outer,
    stride_inner,
    stride_part,
    stride_residual,
    eps,
    limit,
    smallest,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    ADD: tl.constexpr,
    QUANTIZE: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    DTYPE: tl.constexpr = residual.dtype.element_ty if ADD else x.dtype.element_ty
    columns = tl.arange(0, PADDED_SIZE)[None, :]
    if PDL:
        gdc_launch_dependents()
    # The weight is constant, so it may be read before the previous kernel has finished.
    scale = tl.load(weight + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    inside = (row < num_rows) & (columns < SIZE)
    source = x + (row // inner) * stride_outer + (row % inner) * stride_inner + columns
    values = tl.load(source, mask=inside, other=0.0)
    if PARTS > 1:
        for part in tl.static_range(1, PARTS):
            values += tl.load(source + part * stride_part, mask=inside, other=0.0)
        # Rounded as the linear layer whose parts these are would have rounded its output.
        values = values.to(DTYPE)
    if ADD:
        pointers = residual + row * stride_residual + columns
        # Rounded to the residual's dtype first: the norm then sees exactly what the next layer adds to.
        total = values.to(tl.float32) + tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        values = total.to(DTYPE)
        tl.store(pointers, values, mask=inside)
    values = values.to(tl.float32)
    mean_square = tl.sum(values * values, 1) / SIZE
    result = (values * tl.rsqrt(mean_square + eps)[:, None] * scale).to(DTYPE)
    if QUANTIZE:
        _store_codes(result.to(tl.float32), out, row_scales, row, num_rows, limit, smallest, SIZE, HALF)
    else:
        tl.store(out + row * SIZE + columns, result, mask=inside)


@triton.jit
def _store_codes(
    values,  # [ROWS, padded size] float32
    out,
    scales,
    row,  # [ROWS, 1]
    num_rows,
    limit,
    smallest,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
):
    ROWS: tl.constexpr = values.shape[0]
    BLOCKS: tl.constexpr = values.shape[1] // (2 * HALF)
    NUM_BLOCKS: tl.constexpr = (SIZE + 2 * HALF - 1) // (2 * HALF)
    scale = row_scale(tl.max(tl.abs(values), 1, keep_dims=True), smallest, limit)
    tl.store(scales + row, scale, mask=row < num_rows)
    codes = round_codes(values / scale, limit, out.dtype.element_ty)
    codes = tl.permute(tl.reshape(codes, [ROWS, BLOCKS, 2, HALF]), (0, 1, 3, 2))
    block = tl.arange(0, BLOCKS)[None, :, None]
    targets = (row * NUM_BLOCKS * 2 * HALF)[:, :, None] + block * 2 * HALF + tl.arange(0, 2 * HALF)[None, None, :]
    inside = (row < num_rows)[:, :, None] & (block < NUM_BLOCKS)
    tl.store(out + targets, tl.reshape(codes, [ROWS, BLOCKS, 2 * HALF]), mask=inside)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Rows,
    *,
    residual: Tensor | None = None,
    config: NormConfig | None = None,
    pdl: bool = False,
) -> None:
    """Norm of x [..., H] with weight [H] into out of the same shape, contiguous; statistics in float32.

    x has at most three dimensions and contiguous rows. With residual [T, H], x [T, H] is added to it in place and the
    norm is that of the sum; x may then come in parts to be added up, [P, T, H] float32. As QuantizedRows, out are the
    rows that ``quantize_rows`` makes of the norm: bit for bit from 513 columns on, where a program has one row.
    """
    _check(x, weight, out, residual)
    size, in_parts = weight.shape[0], residual is not None and x.dim() == 3
    num_rows = x.numel() // (size * (x.shape[0] if in_parts else 1))
    if num_rows == 0:
        return
    inner = x.shape[1] if x.dim() == 3 and not in_parts else 1
    config = config or default_config(size, num_rows)
    if isinstance(out, QuantizedRows):
        values, scales, limit, least_columns = out.values, out.scales, out.limit, BLOCK
    else:
        values, scales, limit, least_columns = out, None, 0.0, 1
    _rms_norm_kernel[(triton.cdiv(num_rows, config.rows),)](
        x, residual, weight, values, scales, num_rows, inner,
        x.stride(1) if in_parts else x.stride(0) if x.dim() > 1 else 0, x.stride(1) if inner > 1 else 0,
        x.stride(0) if in_parts else 0, residual.stride(0) if residual is not None else 0, eps, limit, SMALLEST,
        SIZE=size, PADDED_SIZE=max(triton.next_power_of_2(size), least_columns), ROWS=config.rows,
        PARTS=x.shape[0] if in_parts else 1, ADD=residual is not None,
        QUANTIZE=scales is not None, HALF=BLOCK // 2, PDL=pdl, num_warps=config.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _check(x: Tensor, weight: Tensor, out: Rows, residual: Tensor | None) -> None:
    in_parts = residual is not None and x.dim() == 3
    check_dtype("x", x, (torch.float32,) if in_parts else FLOAT_DTYPES)
    check_shape("x", x, (*x.shape[:-1], weight.shape[0]))
    check_last_contiguous("x", x)
    if x.dim() > 3:
        raise ValueError(f"x is {tuple(x.shape)}; at most three dimensions are allowed")
    shape = tuple(x.shape[1:] if in_parts else x.shape)
    if residual is not None:
        check_shape("residual", residual, shape)
        check_last_contiguous("residual", residual)
    if isinstance(out, QuantizedRows):
        check_rows("out", out, shape, x.dtype if residual is None else residual.dtype)
    else:
        check_shape("out", out, shape)
        check_last_contiguous("out", out, out.dim())
