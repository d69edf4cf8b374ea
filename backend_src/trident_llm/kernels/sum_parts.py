"""Adds up the parts of a product whose sum several programs shared."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape

_TILE = 1024


@triton.jit
def _sum_parts_kernel(
    parts,  # [PARTS, size] float32
    bias,  # [row_size]; unused unless HAS_BIAS
    out,  # [size]
    size,
    row_size,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offsets < size
    total = tl.load(parts + offsets, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * size.to(tl.int64) + offsets, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + offsets % row_size, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)


def sum_parts(parts: Tensor, out: Tensor, *, bias: Tensor | None = None, pdl: bool = False) -> None:
    """Sum of parts [P, T, N] float32 over P, plus bias [N], into out [T, N]; all contiguous."""
    check_dtype("parts", parts, (torch.float32,))
    check_shape("parts", parts, (parts.shape[0], *out.shape))
    check_dtype("out", out, FLOAT_DTYPES)
    check_last_contiguous("parts", parts, 3)
    check_last_contiguous("out", out, 2)
    if out.numel() == 0:
        return
    _sum_parts_kernel[(triton.cdiv(out.numel(), _TILE),)](
        parts, bias, out, out.numel(), out.shape[1], PARTS=parts.shape[0], HAS_BIAS=bias is not None, TILE=_TILE,
        PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
