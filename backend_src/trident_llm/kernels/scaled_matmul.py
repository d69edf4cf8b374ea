"""Products of 8-bit activations with 8-bit weights, int8 or e4m3, scaled where they are written.

Programs that share a tile of the weight run side by side: the weight streams from memory once, and x stays in L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape
from .packed_bytes import PackedBytes
from .quantized_rows import QuantizedRows

_TILE_INPUTS = 128


@dataclass(frozen=True)
class ScaledConfig:
    tile_outputs: int
    tile_rows: int
    num_warps: int
    num_stages: int
    num_splits: ClassVar[int] = 1
    """Every program computes whole sums."""


def default_config(num_rows: int) -> ScaledConfig:
    """Tiles that fill the shared memory of an H100 and leave as many programs as multiprocessors."""
    if num_rows <= 64:
        return ScaledConfig(64, max(16, triton.next_power_of_2(num_rows)), 4, 5)
    if num_rows <= 256:
        return ScaledConfig(128, 128, 8, 4)
    return ScaledConfig(128, 256, 8, 4)


@triton.jit(do_not_specialize=["num_rows"])
def _scaled_matmul_kernel(
    x,  # [num_rows, NUM_INPUTS] int8 or float8_e4m3fn
    x_scales,  # [num_rows] float32
    weight,  # [num_outputs, NUM_INPUTS], x's dtype
    weight_scales,  # [num_outputs] float32
    bias,  # [num_outputs]; unused unless HAS_BIAS
    out,  # [num_rows, num_outputs]
    num_outputs,
    num_rows,
    stride_out,
    NUM_INPUTS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    SUMS: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    outputs = tl.program_id(1) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    columns = tl.arange(0, TILE_INPUTS)
    # Rows beyond the last read its values again: a mask would forbid asynchronous copies.
    weight_rows = tl.minimum(outputs, num_outputs - 1).to(tl.int64)[:, None] * NUM_INPUTS
    x_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * NUM_INPUTS
    if PDL:
        gdc_wait()
    acc = tl.zeros([TILE_OUTPUTS, TILE_ROWS], SUMS)
    for first in tl.range(0, NUM_INPUTS, TILE_INPUTS, num_stages=STAGES):
        w = tl.load(weight + weight_rows + first + columns[None, :])
        values = tl.load(x + x_rows + first + columns[None, :])
        # The matrix units keep some 14 bits of a sum of e4m3 products: what they add up goes to float32 tile by tile.
        acc = tl.dot(w, tl.trans(values), acc, out_dtype=SUMS, max_num_imprecise_acc=TILE_INPUTS)
    inside_outputs, inside_rows = outputs < num_outputs, rows < num_rows
    scale = tl.load(weight_scales + outputs, mask=inside_outputs, other=0.0)[:, None]
    total = acc.to(tl.float32) * scale * tl.load(x_scales + rows, mask=inside_rows, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=inside_outputs, other=0.0).to(tl.float32)[:, None]
    target = out + rows.to(tl.int64)[:, None] * stride_out + outputs[None, :]
    mask = inside_rows[:, None] & inside_outputs[None, :]
    tl.store(target, tl.trans(total).to(out.dtype.element_ty), mask=mask)


def scaled_matmul(
    x: QuantizedRows,
    weight: PackedBytes,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    config: ScaledConfig | None = None,
    pdl: bool = False,
) -> None:
    """x [T, in] times weight [out, in] transposed, plus bias [out], into out [T, out].

    Sums in int32 for int8, in float32 for e4m3, then times the scales of row and output.
    """
    num_rows, num_inputs = x.values.shape
    num_outputs = weight.shape[0]
    config = config or default_config(num_rows)
    check_dtype("x", x.values, (weight.codes.dtype,))
    check_shape("weight", weight.codes, (num_outputs, num_inputs))
    check_dtype("out", out, FLOAT_DTYPES)
    check_shape("out", out, (num_rows, num_outputs))
    check_last_contiguous("out", out)
    grid = (triton.cdiv(num_rows, config.tile_rows), triton.cdiv(num_outputs, config.tile_outputs))
    _scaled_matmul_kernel[grid](
        x.values, x.scales, weight.codes, weight.scales, bias, out, num_outputs, num_rows, out.stride(0),
        NUM_INPUTS=num_inputs, TILE_OUTPUTS=config.tile_outputs, TILE_ROWS=config.tile_rows, TILE_INPUTS=_TILE_INPUTS,
        STAGES=config.num_stages, HAS_BIAS=bias is not None, PDL=pdl, num_warps=config.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
