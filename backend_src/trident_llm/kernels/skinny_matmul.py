"""Linear layers of a few dozen rows: the weight streams through the matrix units once. Bound by memory bandwidth.

The weight is the left operand of the matrix instruction, so the few rows of x fill its short side instead of padding
its long one. Knows nothing of the layer it serves.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import HALF_DTYPES, check_dtype, check_last_contiguous, check_shape

MAX_ROWS = 64


@dataclass(frozen=True)
class SkinnyConfig:
    tile_outputs: int
    tile_inputs: int
    num_warps: int
    num_stages: int
    prefetch: int
    """Columns of its weight rows that a program brings into L2 while the previous kernel still runs; 0 for none."""


def default_config(num_rows: int, num_outputs: int) -> SkinnyConfig:
    """At least one program per multiprocessor, and 48 KiB of the weight in flight on each."""
    if num_rows > 32:
        return SkinnyConfig(64, 128, 4, 4, 512)
    if num_outputs > 4096:
        return SkinnyConfig(32, 256, 4, 4, 1024)
    return SkinnyConfig(16, 256, 4, 4, 1024)


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_matmul_kernel(
    x,  # [num_rows, NUM_INPUTS]
    weight,  # [num_outputs, NUM_INPUTS]
    bias,  # [num_outputs]; unused unless HAS_BIAS
    out,  # [num_rows, num_outputs]
    num_outputs,
    num_rows,
    stride_x,
    stride_weight,
    stride_out,
    NUM_INPUTS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    outputs = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    columns = tl.arange(0, TILE_INPUTS)
    rows = tl.arange(0, PADDED_ROWS)
    in_range = outputs < num_outputs
    # Rows beyond the last read its values again: a mask on the weight would forbid asynchronous copies.
    weight_rows = tl.minimum(outputs, num_outputs - 1).to(tl.int64)[:, None] * stride_weight
    if PDL:
        if PREFETCH > 0:
            lines = weight + weight_rows + tl.minimum(tl.arange(0, PREFETCH // 64) * 64, NUM_INPUTS - 1)[None, :]
            tl.inline_asm_elementwise(
                "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
            )
        gdc_wait()
    x_mask = (rows < num_rows)[:, None]
    pointers = weight + weight_rows + columns[None, :]
    x_pointers = x + rows[:, None] * stride_x + columns[None, :]
    acc = tl.zeros([TILE_OUTPUTS, PADDED_ROWS], tl.float32)
    for first in tl.range(0, NUM_INPUTS, TILE_INPUTS, num_stages=STAGES):
        if NUM_INPUTS % TILE_INPUTS == 0:
            w = tl.load(pointers + first, eviction_policy="evict_first")
            values = tl.load(x_pointers + first, mask=x_mask, other=0.0)
        else:
            inside = (first + columns < NUM_INPUTS)[None, :]
            w = tl.load(pointers + first, mask=inside, other=0.0, eviction_policy="evict_first")
            values = tl.load(x_pointers + first, mask=x_mask & inside, other=0.0)
        acc = tl.dot(w, tl.trans(values), acc)
    if HAS_BIAS:
        acc += tl.load(bias + outputs, mask=in_range, other=0.0).to(tl.float32)[:, None]
    target = out + rows[None, :] * stride_out + outputs[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=in_range[:, None] & (rows < num_rows)[None, :])


def skinny_matmul(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    config: SkinnyConfig | None = None,
    pdl: bool = False,
) -> None:
    """x [T, in] times weight [out, in] transposed, plus bias [out], into out [T, out]; T at most ``MAX_ROWS``.

    bf16 or fp16, sums in float32. With pdl the weight must not be written by the kernel launched just before.
    """
    num_rows, num_inputs = x.shape
    num_outputs = out.shape[1]
    check_dtype("x", x, HALF_DTYPES)
    check_dtype("weight", weight, (x.dtype,))
    check_shape("weight", weight, (num_outputs, num_inputs))
    check_shape("out", out, (num_rows, num_outputs))
    for name, tensor in (("x", x), ("weight", weight), ("out", out)):
        check_last_contiguous(name, tensor)
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"x has {num_rows} rows; allowed: 1 to {MAX_ROWS}")
    config = config or default_config(num_rows, num_outputs)
    _skinny_matmul_kernel[(triton.cdiv(num_outputs, config.tile_outputs),)](
        x, weight, bias, out, num_outputs, num_rows, x.stride(0), weight.stride(0), out.stride(0),
        NUM_INPUTS=num_inputs, PADDED_ROWS=max(8, triton.next_power_of_2(num_rows)),
        TILE_OUTPUTS=config.tile_outputs, TILE_INPUTS=config.tile_inputs, STAGES=config.num_stages,
        PREFETCH=config.prefetch, HAS_BIAS=bias is not None, PDL=pdl,
        num_warps=config.num_warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip

