"""Linear layers of a few dozen rows: the weight streams through the matrix units once. Bound by memory bandwidth.

The weight is the left operand of the matrix instruction, so the few rows of x fill its short side instead of padding
its long one. Low-rank updates of the layer are more columns of the same sums (``lora_updates``).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import HALF_DTYPES, check_dtype, check_last_contiguous, check_product, check_shape
from .lora_updates import NO_UPDATES, Updates, add_updates, update_arguments, used_ranks

MAX_ROWS = 128
_MIN_TILE_ROWS = 16
"""With 8 the compiler leaves the warp group's matrix instruction: 14.4 instead of 12.3 us for 4096 x 4096."""


@dataclass(frozen=True)
class SkinnyConfig:
    tile_outputs: int
    tile_inputs: int
    num_warps: int
    num_stages: int
    prefetch: int
    """Columns of its weight rows that a program brings into L2 while the previous kernel still runs; 0 for none."""
    num_splits: int = 1
    """Programs that share the columns of a weight row; each writes its own part of the sum."""


_MANY_OUTPUTS = 7_000
"""From so many on, tiles of 64 outputs alone keep the multiprocessors of a large GPU busy."""


def default_config(
    num_rows: int, num_outputs: int, *, silu_and_mul: bool = False, may_split: bool = False
) -> SkinnyConfig:
    """The fastest of those timed on an H100 for the shapes of Mistral-7B, within its shared memory."""
    if silu_and_mul:
        return SkinnyConfig(64, 128, 4, 3, 0) if num_rows <= 64 else SkinnyConfig(64, 64, 8, 5, 0)
    if may_split:
        return SkinnyConfig(64, 128, 4, 4, 512, 4 if num_rows <= 32 else 2)
    if num_rows > 64:
        return SkinnyConfig(64, 128, 4, 4, 512)
    if num_outputs < _MANY_OUTPUTS:
        return SkinnyConfig(64, 128, 4, 5, 512)
    return SkinnyConfig(64, 128, 4, 6, 0) if num_rows <= 32 else SkinnyConfig(128, 64, 8, 5, 0)


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_matmul_kernel(
    x,  # [num_rows, NUM_INPUTS]
    weight,  # [num_outputs, NUM_INPUTS]
    bias,  # [num_outputs]; unused unless HAS_BIAS
    out,  # [num_rows, num_outputs]; [NUM_SPLITS, num_rows, num_outputs] float32 with several splits
    b,  # [layer_outputs, S, MAX_RANK]; this and what follows: see add_updates; unused unless UPDATES
    gains,
    ranks,
    has_gains,
    weights,
    tile_slots,
    hidden,
    num_outputs,
    num_rows,
    stride_x,
    stride_weight,
    stride_out,
    stride_split,
    layer_outputs,
    stride_weights_part,
    stride_weights_row,
    NUM_INPUTS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
    UPDATES: tl.constexpr,
    SIZE0: tl.constexpr,
    SIZE1: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    HIDDEN_SPLITS: tl.constexpr,
    PADDED_SLOTS: tl.constexpr,
    TILE_INNER: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    # Whole tiles a split, the last one takes what is left.
    SHARE: tl.constexpr = (NUM_INPUTS + NUM_SPLITS * TILE_INPUTS - 1) // (NUM_SPLITS * TILE_INPUTS) * TILE_INPUTS
    split = tl.program_id(1)
    begin = split * SHARE
    end = min(begin + SHARE, NUM_INPUTS)
    outputs = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    columns = tl.arange(0, TILE_INPUTS)
    rows = tl.arange(0, PADDED_ROWS)
    in_range = outputs < num_outputs
    # Rows beyond the last read its values again: a mask on the weight would forbid asynchronous copies.
    weight_rows = tl.minimum(outputs, num_outputs - 1).to(tl.int64)[:, None] * stride_weight
    first_output = tl.program_id(0) * TILE_OUTPUTS
    if UPDATES:
        # They are older than the step.
        used, end_slot = used_ranks(tile_slots, ranks, NUM_SLOTS, MAX_RANK, PADDED_SLOTS)
    if PDL:
        if PREFETCH > 0:
            ahead = begin + tl.arange(0, PREFETCH // 64) * 64
            lines = weight + weight_rows + tl.minimum(ahead, NUM_INPUTS - 1)[None, :]
            tl.inline_asm_elementwise(
                "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
            )
        # Shrink lets this kernel begin when x is there.
        if not UPDATES:
            gdc_wait()
    x_mask = (rows < num_rows)[:, None]
    pointers = weight + weight_rows + columns[None, :]
    x_pointers = x + rows[:, None] * stride_x + columns[None, :]
    acc = tl.zeros([TILE_OUTPUTS, PADDED_ROWS], tl.float32)
    if SILU:
        up_pointers = pointers + num_outputs.to(tl.int64) * stride_weight
        acc_up = tl.zeros([TILE_OUTPUTS, PADDED_ROWS], tl.float32)
    for first in tl.range(begin, end, TILE_INPUTS, num_stages=STAGES):
        if NUM_INPUTS % TILE_INPUTS == 0:
            w = tl.load(pointers + first, eviction_policy="evict_first")
            values = tl.load(x_pointers + first, mask=x_mask, other=0.0)
            if SILU:
                up = tl.load(up_pointers + first, eviction_policy="evict_first")
        else:
            inside = (first + columns < NUM_INPUTS)[None, :]
            w = tl.load(pointers + first, mask=inside, other=0.0, eviction_policy="evict_first")
            values = tl.load(x_pointers + first, mask=x_mask & inside, other=0.0)
            if SILU:
                up = tl.load(up_pointers + first, mask=inside, other=0.0, eviction_policy="evict_first")
        acc = tl.dot(w, tl.trans(values), acc)
        if SILU:
            acc_up = tl.dot(up, tl.trans(values), acc_up)
    if UPDATES:
        if PDL:
            gdc_wait()
        adds = split == NUM_SPLITS - 1
        acc = add_updates(
            acc, used, end_slot, b, gains, has_gains, weights, hidden, first_output, adds, num_rows, layer_outputs,
            stride_weights_part, stride_weights_row, SIZE0, SIZE1, NUM_PARTS, NUM_SLOTS, MAX_RANK, HIDDEN_SPLITS,
            TILE_OUTPUTS, PADDED_ROWS, PADDED_SLOTS, TILE_INNER,
        )  # fmt: skip
        if SILU:
            acc_up = add_updates(
                acc_up, used, end_slot, b, gains, has_gains, weights, hidden, first_output + num_outputs, adds,
                num_rows, layer_outputs, stride_weights_part, stride_weights_row, SIZE0, SIZE1, NUM_PARTS, NUM_SLOTS,
                MAX_RANK, HIDDEN_SPLITS, TILE_OUTPUTS, PADDED_ROWS, PADDED_SLOTS, TILE_INNER,
            )  # fmt: skip
    if SILU:
        # Rounded in between as two kernels would round: the fusion does not change the result.
        gate = acc.to(out.dtype.element_ty).to(tl.float32)
        acc = gate / (1.0 + tl.exp(-gate)) * acc_up.to(out.dtype.element_ty).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + outputs, mask=in_range, other=0.0).to(tl.float32)[:, None]
    target = out + split * stride_split + rows[None, :] * stride_out + outputs[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=in_range[:, None] & (rows < num_rows)[None, :])


def skinny_matmul(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    silu_and_mul: bool = False,
    updates: Updates | None = None,
    config: SkinnyConfig | None = None,
    pdl: bool = False,
) -> None:
    """x [T, in] times weight [out, in] transposed, plus bias [out], into out [T, out]; T at most ``MAX_ROWS``.

    With ``config.num_splits`` above 1 out is [num_splits, T, out] float32, and its sum over the first dimension is the
    product; there is no bias then. silu_and_mul: weight is [2 * out, in], gate first, and out is silu(gate) * up, with
    neither bias nor splits. updates: low-rank ones, that the product comes with. bf16 or fp16, sums in float32. With
    pdl the weight must not be written by the kernel launched just before; with updates that kernel must be their
    ``shrink`` with pdl.
    """
    num_rows, num_inputs = x.shape
    num_outputs = out.shape[-1]
    config = config or default_config(num_rows, num_outputs, silu_and_mul=silu_and_mul)
    check_dtype("x", x, HALF_DTYPES)
    check_dtype("weight", weight, (x.dtype,))
    check_shape("weight", weight, ((2 if silu_and_mul else 1) * num_outputs, num_inputs))
    check_product(
        out, num_rows, num_splits=config.num_splits, has_bias=bias is not None, silu_and_mul=silu_and_mul
    )
    for name, tensor in (("x", x), ("weight", weight), ("out", out)):
        check_last_contiguous(name, tensor)
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"x has {num_rows} rows; allowed: 1 to {MAX_ROWS}")
    own = NO_UPDATES if updates is None else update_arguments(updates, num_rows, config.tile_outputs, x.dtype)
    _skinny_matmul_kernel[(triton.cdiv(num_outputs, config.tile_outputs), config.num_splits)](
        x, weight, bias, out, num_outputs=num_outputs, num_rows=num_rows, stride_x=x.stride(0),
        stride_weight=weight.stride(0), stride_out=out.stride(-2),
        stride_split=out.stride(0) if config.num_splits > 1 else 0,
        NUM_INPUTS=num_inputs, PADDED_ROWS=max(_MIN_TILE_ROWS, triton.next_power_of_2(num_rows)),
        TILE_OUTPUTS=config.tile_outputs, TILE_INPUTS=config.tile_inputs, STAGES=config.num_stages,
        PREFETCH=config.prefetch, NUM_SPLITS=config.num_splits, HAS_BIAS=bias is not None, SILU=silu_and_mul, PDL=pdl,
        num_warps=config.num_warps, **own, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip

