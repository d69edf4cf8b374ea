"""silu(gate) * up for a merged projection. Shazeer 2020 (SwiGLU)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape

_TILE = 1024


@triton.jit
def load_gated(
    gate_up,  # [2 * size], gate first
    columns,
    size,
):
    """silu(gate) * up in float32; 0 for columns from ``size`` on."""
    inside = columns < size
    # Nobody reads gate_up again: it should leave the L2 cache before the output does.
    gate = tl.load(gate_up + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    up = tl.load(gate_up + size + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _silu_and_mul_kernel(
    gate_up,  # [T, 2 * size], gate first
    out,  # [T, size]
    size,
    stride_in,
    stride_out,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tiles = tl.cdiv(size, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    columns = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    result = load_gated(gate_up + row * stride_in, columns, size)
    tl.store(out + row * stride_out + columns, result.to(out.dtype.element_ty), mask=columns < size)


def silu_and_mul(gate_up: Tensor, out: Tensor, *, pdl: bool = False) -> None:
    """silu(gate) * up of gate_up [T, 2 * I], gate first, into out [T, I]; computed in float32."""
    num_rows, size = out.shape
    check_dtype("gate_up", gate_up, FLOAT_DTYPES)
    check_shape("gate_up", gate_up, (num_rows, 2 * size))
    check_last_contiguous("gate_up", gate_up)
    check_last_contiguous("out", out)
    if num_rows == 0:
        return
    # One axis: the others of a grid end at 65,535.
    _silu_and_mul_kernel[(triton.cdiv(size, _TILE) * num_rows,)](
        gate_up, out, size, gate_up.stride(0), out.stride(0), TILE=_TILE, PDL=pdl,
        num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
