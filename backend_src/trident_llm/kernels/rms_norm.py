"""RMSNorm, optionally with the residual addition before it. Zhang and Sennrich 2019. Knows rows only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x,  # [num_rows // inner, inner, size], strides below; [PARTS, num_rows, size] float32 with several parts
    residual,  # [num_rows, size], updated in place; unused unless ADD
    weight,  # [size]
    out,  # [num_rows, size] contiguous
    num_rows,
    inner,
    stride_outer,
    stride_inner,
    stride_part,
    stride_residual,
    eps,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
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
        values = values.to(out.dtype.element_ty)
    if ADD:
        pointers = residual + row * stride_residual + columns
        # Rounded to the residual's dtype first: the norm then sees exactly what the next layer adds to.
        total = values.to(tl.float32) + tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        values = total.to(residual.dtype.element_ty)
        tl.store(pointers, values, mask=inside)
    values = values.to(tl.float32)
    mean_square = tl.sum(values * values, 1) / SIZE
    result = values * tl.rsqrt(mean_square + eps)[:, None] * scale
    tl.store(out + row * SIZE + columns, result.to(out.dtype.element_ty), mask=inside)


_VALUES_PER_PROGRAM = 4096


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor, *, residual: Tensor | None = None, pdl: bool = False
) -> None:
    """Norm of x [..., H] with weight [H] into out of the same shape, contiguous; statistics in float32.

    x has at most three dimensions and contiguous rows. With residual [T, H], x [T, H] is added to it in place and the
    norm is that of the sum; x may then come in parts to be added up, [P, T, H] float32.
    """
    size = weight.shape[0]
    in_parts = residual is not None and x.dim() == 3
    check_dtype("x", x, (torch.float32,) if in_parts else FLOAT_DTYPES)
    check_shape("x", x, (*x.shape[:-1], size))
    check_last_contiguous("x", x)
    check_shape("out", out, tuple(x.shape[1:] if in_parts else x.shape))
    check_last_contiguous("out", out, out.dim())
    if residual is not None:
        check_shape("residual", residual, tuple(out.shape))
        check_last_contiguous("residual", residual)
    if x.dim() > 3:
        raise ValueError(f"x is {tuple(x.shape)}; at most three dimensions are allowed")
    inner = x.shape[1] if x.dim() == 3 and not in_parts else 1
    num_rows = out.numel() // size
    if num_rows == 0:
        return
    padded = triton.next_power_of_2(size)
    rows = max(1, min(_VALUES_PER_PROGRAM // 4 // padded, triton.next_power_of_2(num_rows)))
    _rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x, residual, weight, out, num_rows, inner,
        x.stride(1) if in_parts else x.stride(0) if x.dim() > 1 else 0, x.stride(1) if inner > 1 else 0,
        x.stride(0) if in_parts else 0,
        residual.stride(0) if residual is not None else 0, eps,
        SIZE=size, PADDED_SIZE=padded, ROWS=rows, PARTS=x.shape[0] if in_parts else 1, ADD=residual is not None,
        PDL=pdl,
        num_warps=8 if padded >= _VALUES_PER_PROGRAM else 4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
