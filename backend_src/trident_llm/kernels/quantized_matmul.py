"""Products with quantized weights: the packed weight streams through the matrix units and is unpacked in registers.

The weight is the left operand of the matrix instruction, so few rows of x fill its short side. With few rows the sums
of each group are scaled in float32; with many the unpacked weights are, which costs fewer registers. Knows nothing of
the layer it serves.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import HALF_DTYPES, check_dtype, check_last_contiguous, check_product
from .packed_weight import PackedWeight
from .unpack_codes import scales_of, unpack

MAX_ROWS = 384
"""With more it pays to unpack the weight once, to memory."""
_MIN_TILE_ROWS = 16
MAX_SILU_ROWS = 128
"""With more two kernels are faster than one that holds the sums of gate and up."""
_FEW_OUTPUTS = 4096
_SCALED_SUMS = 32
"""Up to so many sums a thread holds they are scaled, and not the weights: each takes a second register then."""


@dataclass(frozen=True)
class QuantizedConfig:
    tile_outputs: int
    tile_rows: int
    tile_words: int
    """Words of each output loaded at once: at most a chunk."""
    num_warps: int
    num_stages: int
    num_splits: int = 1
    """Programs that share the columns of a weight row; each writes its own part of the sum."""


def default_config(
    num_rows: int, num_outputs: int, *, silu_and_mul: bool = False, may_split: bool = False
) -> QuantizedConfig:
    """The fastest of those timed on an H100 for the shapes of Mistral-7B.

    may_split: whether several programs may share a sum, for matrices of few outputs.
    """
    tile_rows = max(_MIN_TILE_ROWS, triton.next_power_of_2(num_rows))
    if silu_and_mul:
        return QuantizedConfig(64, tile_rows, 32, 4, 4) if num_rows <= 64 else QuantizedConfig(128, 128, 32, 8, 3)
    if not may_split:
        return QuantizedConfig(256, min(tile_rows, 128), 32, 8, 3)
    if num_rows <= 64:
        return QuantizedConfig(64, tile_rows, 32, 4, 3 if num_outputs > _FEW_OUTPUTS else 4, 4)
    if num_outputs > _FEW_OUTPUTS:
        return QuantizedConfig(128, 64, 32, 4, 3, 4 if num_rows <= 128 else 2)
    return QuantizedConfig(256, 128, 32, 8, 3, 8 if num_rows <= 128 else 4)


@triton.jit
def _add_words(
    acc, low, high, x_pointers, x_mask, scale_pointers, groups_stride, block, part,
    BITS: tl.constexpr, CHUNK: tl.constexpr, WORDS: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_INPUTS: tl.constexpr,
    SCALE_SUMS: tl.constexpr, PER_WORD: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc plus the product of words [outputs, WORDS], part of a block, with their columns of x."""
    VALUES: tl.constexpr = 2 if BITS == 8 else 4
    NUM_GROUPS: tl.constexpr = (NUM_INPUTS + GROUP_SIZE - 1) // GROUP_SIZE
    WHOLE_ROW: tl.constexpr = GROUP_SIZE == NUM_INPUTS
    SCALED: tl.constexpr = not (WHOLE_ROW or SCALE_SUMS)
    columns = tl.arange(0, WORDS)
    sums = tl.zeros(acc.shape, tl.float32)
    scales_and_zeros = tl.load(scale_pointers + block * VALUES * CHUNK // GROUP_SIZE * groups_stride)
    for j in tl.static_range(VALUES):
        first = (block * VALUES + j) * CHUNK
        if not WHOLE_ROW and j > 0 and j * CHUNK % GROUP_SIZE == 0:
            group = tl.minimum(first // GROUP_SIZE, NUM_GROUPS - 1)
            scales_and_zeros = tl.load(scale_pointers + group * groups_stride)
        first += part * WORDS
        if NUM_INPUTS % (VALUES * CHUNK) == 0:
            values = tl.load(x_pointers + first, mask=x_mask, other=0.0)
        else:
            values = tl.load(x_pointers + first, mask=x_mask & (first + columns < NUM_INPUTS)[None, :], other=0.0)
        shift = (block % PER_WORD * 4 + j) * (BITS - 4)
        weight = unpack(low, high, scales_and_zeros, j, shift, BITS, SCALED, DTYPE, ASM)
        if SCALE_SUMS and not WHOLE_ROW:
            sums = tl.dot(weight, tl.trans(values), sums)
            if (j + 1) * CHUNK % GROUP_SIZE == 0 or j == VALUES - 1:
                acc += sums * scales_of(scales_and_zeros)[:, None]
                sums = tl.zeros(acc.shape, tl.float32)
        else:
            acc = tl.dot(weight, tl.trans(values), acc)
    return acc


@triton.jit
def _word_pointers(words, outputs, stride_panel, CHUNK: tl.constexpr, WORDS: tl.constexpr):
    """Of the first words of each output, [outputs, WORDS]."""
    panel = (outputs // 64).to(tl.int64)
    return words + (panel * stride_panel + outputs % 64 * CHUNK)[:, None] + tl.arange(0, WORDS)[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _quantized_matmul_kernel(
    x,  # [num_rows, NUM_INPUTS]
    low,  # [panels, blocks, 64, CHUNK] int16, outputs in panels of 64; gate first with SILU, then up
    high,  # the second plane, [panels, blocks, 64, CHUNK] int16; unused unless BITS is 5 or 6
    scales_and_zeros,  # [groups, num_outputs] int32; [groups, 2 * num_outputs] with SILU
    bias,  # [num_outputs]; unused unless HAS_BIAS
    out,  # [num_rows, num_outputs]; [NUM_SPLITS, num_rows, num_outputs] float32 with several splits
    num_outputs,
    num_rows,
    stride_x,
    stride_low,
    stride_high,
    stride_groups,
    stride_out,
    stride_split,
    NUM_INPUTS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    DTYPE: tl.constexpr = x.dtype.element_ty
    BLOCK: tl.constexpr = 64 * CHUNK
    VALUES: tl.constexpr = 2 if BITS == 8 else 4
    PER_WORD: tl.constexpr = 2 if BITS == 6 else 4
    NUM_BLOCKS: tl.constexpr = (NUM_INPUTS + VALUES * CHUNK - 1) // (VALUES * CHUNK)
    SHARE: tl.constexpr = (NUM_BLOCKS + NUM_SPLITS - 1) // NUM_SPLITS
    split = tl.program_id(2)
    begin = split * SHARE
    end = min(begin + SHARE, NUM_BLOCKS)
    outputs = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    rows = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    in_range = outputs < num_outputs
    if not WHOLE_TILES:
        # Outputs beyond the last read its weights again: a mask on the weight would forbid asynchronous copies.
        outputs = tl.minimum(outputs, num_outputs - 1)
    low_pointers = _word_pointers(low, outputs, stride_low, CHUNK, WORDS)
    high_pointers = _word_pointers(high, outputs, stride_high, CHUNK, WORDS)
    if SILU:
        up_pointers = _word_pointers(low, outputs + num_outputs, stride_low, CHUNK, WORDS)
        up_high_pointers = _word_pointers(high, outputs + num_outputs, stride_high, CHUNK, WORDS)
    if PDL:
        gdc_wait()
    x_mask = (rows < num_rows)[:, None]
    x_pointers = x + rows[:, None] * stride_x + tl.arange(0, WORDS)[None, :]
    scale_pointers = scales_and_zeros + outputs
    acc = tl.zeros([TILE_OUTPUTS, TILE_ROWS], tl.float32)
    if SILU:
        acc_up = tl.zeros([TILE_OUTPUTS, TILE_ROWS], tl.float32)
    PARTS: tl.constexpr = CHUNK // WORDS
    for step in tl.range(begin * PARTS, end * PARTS, num_stages=STAGES):
        block = step // PARTS
        part = step % PARTS
        ahead = block * BLOCK + part * WORDS
        words = tl.load(low_pointers + ahead, eviction_policy="evict_first")
        extra = words
        if BITS == 5 or BITS == 6:
            extra = tl.load(high_pointers + block // PER_WORD * BLOCK + part * WORDS)
        acc = _add_words(
            acc, words, extra, x_pointers, x_mask, scale_pointers, stride_groups, block, part,
            BITS, CHUNK, WORDS, GROUP_SIZE, NUM_INPUTS, SCALE_SUMS, PER_WORD, DTYPE, ASM,
        )  # fmt: skip
        if SILU:
            words = tl.load(up_pointers + ahead, eviction_policy="evict_first")
            extra = words
            if BITS == 5 or BITS == 6:
                extra = tl.load(up_high_pointers + block // PER_WORD * BLOCK + part * WORDS)
            acc_up = _add_words(
                acc_up, words, extra, x_pointers, x_mask, scale_pointers + num_outputs, stride_groups, block, part,
                BITS, CHUNK, WORDS, GROUP_SIZE, NUM_INPUTS, SCALE_SUMS, PER_WORD, DTYPE, ASM,
            )  # fmt: skip
    if GROUP_SIZE == NUM_INPUTS:
        acc *= scales_of(tl.load(scale_pointers))[:, None]
        if SILU:
            acc_up *= scales_of(tl.load(scale_pointers + num_outputs))[:, None]
    if SILU:
        # Rounded in between as two kernels would round: the fusion does not change the result.
        gate = acc.to(out.dtype.element_ty).to(tl.float32)
        acc = gate / (1.0 + tl.exp(-gate)) * acc_up.to(out.dtype.element_ty).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + outputs).to(tl.float32)[:, None]
    target = out + split * stride_split + rows[None, :] * stride_out + outputs[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=in_range[:, None] & (rows < num_rows)[None, :])


def quantized_matmul(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    silu_and_mul: bool = False,
    config: QuantizedConfig | None = None,
    pdl: bool = False,
    use_asm: bool = True,
) -> None:
    """x [T, in] times weight [out, in] transposed, plus bias [out], into out [T, out].

    With ``config.num_splits`` above 1 out is [num_splits, T, out] float32, and its sum over the first dimension is the
    product; there is no bias then. silu_and_mul: weight is [2 * out, in], gate first, and out is silu(gate) * up, with
    neither bias nor splits. bf16 or fp16, sums in float32. x's columns are in the order of the weight's. use_asm: off
    where there is no GPU. With pdl the weight must not be written by the kernel launched just before.
    """
    num_rows, num_inputs = x.shape
    num_outputs = out.shape[-1]
    config = config or default_config(num_rows, num_outputs, silu_and_mul=silu_and_mul)
    check_dtype("x", x, HALF_DTYPES)
    if weight.shape != ((2 if silu_and_mul else 1) * num_outputs, num_inputs):
        raise ValueError(f"weight is {weight.shape}, x {tuple(x.shape)} and out {tuple(out.shape)}")
    check_product(
        out, num_rows, num_splits=config.num_splits, has_bias=bias is not None, silu_and_mul=silu_and_mul
    )
    for name, tensor in (("x", x), ("out", out)):
        check_last_contiguous(name, tensor)
    high = weight.low if weight.high is None else weight.high
    sums = config.tile_outputs * config.tile_rows * (2 if silu_and_mul else 1) // (32 * config.num_warps)
    grid = (triton.cdiv(num_outputs, config.tile_outputs), triton.cdiv(num_rows, config.tile_rows), config.num_splits)
    _quantized_matmul_kernel[grid](
        x, weight.low, high, weight.scales_and_zeros, bias, out, num_outputs, num_rows, x.stride(0),
        weight.low.stride(0), high.stride(0), weight.scales_and_zeros.stride(0), out.stride(-2),
        out.stride(0) if config.num_splits > 1 else 0,
        NUM_INPUTS=num_inputs, BITS=weight.bits, CHUNK=weight.chunk, WORDS=min(config.tile_words, weight.chunk),
        GROUP_SIZE=weight.group_size, TILE_OUTPUTS=config.tile_outputs, TILE_ROWS=config.tile_rows,
        STAGES=config.num_stages,
        NUM_SPLITS=config.num_splits, SCALE_SUMS=sums <= _SCALED_SUMS,
        WHOLE_TILES=num_outputs % config.tile_outputs == 0, HAS_BIAS=bias is not None, SILU=silu_and_mul, ASM=use_asm,
        PDL=pdl, num_warps=config.num_warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
