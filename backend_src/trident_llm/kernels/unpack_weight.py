"""A packed weight written out whole: for products of so many rows that cuBLAS reading it again costs less."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape
from .packed_weight import PackedWeight
from .unpack_codes import scales_of, unpack


@dataclass(frozen=True)
class UnpackConfig:
    tile_outputs: int
    """Outputs per program; at most 64."""
    blocks: int
    """Blocks of words per program, one after another."""
    num_warps: int


DEFAULT = UnpackConfig(tile_outputs=32, blocks=1, num_warps=4)


@triton.jit
def _unpack_weight_kernel(
    low,  # [panels, blocks, 64, CHUNK] int16, outputs in panels of 64
    high,  # the second plane, [panels, blocks, 64, CHUNK] int16; unused unless BITS is 5 or 6
    scales_and_zeros,  # [groups, num_outputs] int32
    out,  # [num_outputs, NUM_INPUTS]
    num_outputs,
    num_blocks,
    stride_low,
    stride_high,
    stride_groups,
    stride_out,
    NUM_INPUTS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    DTYPE: tl.constexpr = tl.float16 if out.dtype.element_ty == tl.float32 else out.dtype.element_ty
    VALUES: tl.constexpr = 2 if BITS == 8 else 4
    PER_WORD: tl.constexpr = 2 if BITS == 6 else 4
    NUM_GROUPS: tl.constexpr = (NUM_INPUTS + GROUP_SIZE - 1) // GROUP_SIZE
    first_block = tl.program_id(1) * BLOCKS
    outputs = (tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)).to(tl.int64)
    inside = (outputs < num_outputs)[:, None]
    columns = tl.arange(0, CHUNK)[None, :]
    in_panel = (outputs % 64 * CHUNK)[:, None] + columns
    panels = (outputs // 64)[:, None]
    low += panels * stride_low + in_panel
    high += panels * stride_high + in_panel
    words, extra = _load_words(low, high, first_block, inside & (first_block < num_blocks), BITS, CHUNK, PER_WORD)
    if PDL:
        # The memory written may still be read by the product launched before.
        gdc_wait()
    for i in tl.static_range(BLOCKS):
        block = first_block + i
        own_words, own_extra = words, extra
        if i + 1 < BLOCKS:
            # On their way while this block is written.
            there = inside & (block + 1 < num_blocks)
            words, extra = _load_words(low, high, block + 1, there, BITS, CHUNK, PER_WORD)
        for j in tl.static_range(VALUES):
            first = (block * VALUES + j) * CHUNK
            group = tl.minimum(first // GROUP_SIZE, NUM_GROUPS - 1)
            pointers = scales_and_zeros + group * stride_groups + outputs
            pairs = tl.load(pointers, mask=outputs < num_outputs, other=0)
            shift = (block % PER_WORD * 4 + j) * (BITS - 4)
            weight = unpack(own_words, own_extra, pairs, j, shift, BITS, False, DTYPE, ASM).to(tl.float32)
            weight *= scales_of(pairs)[:, None]
            target = out + outputs[:, None] * stride_out + first + columns
            tl.store(target, weight.to(out.dtype.element_ty), mask=inside & (first + columns < NUM_INPUTS))


@triton.jit
def _load_words(low, high, block, mask, BITS: tl.constexpr, CHUNK: tl.constexpr, PER_WORD: tl.constexpr):
    """A block of both planes; that of the second where there is one."""
    words = tl.load(low + block * 64 * CHUNK, mask=mask, other=0)
    extra = words
    if BITS == 5 or BITS == 6:
        extra = tl.load(high + block // PER_WORD * 64 * CHUNK, mask=mask, other=0)
    return words, extra


def unpack_weight(
    weight: PackedWeight,
    out: Tensor,
    *,
    config: UnpackConfig = DEFAULT,
    pdl: bool = False,
    use_asm: bool = True,
) -> None:
    """The weight, dequantized in float32, into out [out, in] of bf16, fp16 or fp32; columns in the packed order.

    use_asm: off where there is no GPU.
    """
    check_dtype("out", out, FLOAT_DTYPES)
    check_shape("out", out, weight.shape)
    check_last_contiguous("out", out)
    num_outputs, num_inputs = weight.shape
    high = weight.low if weight.high is None else weight.high
    num_blocks = triton.cdiv(num_inputs, (2 if weight.bits == 8 else 4) * weight.chunk)
    _unpack_weight_kernel[(triton.cdiv(num_outputs, config.tile_outputs), triton.cdiv(num_blocks, config.blocks))](
        weight.low, high, weight.scales_and_zeros, out, num_outputs, num_blocks, weight.low.stride(0), high.stride(0),
        weight.scales_and_zeros.stride(0), out.stride(0),
        NUM_INPUTS=num_inputs, BITS=weight.bits, CHUNK=weight.chunk, GROUP_SIZE=weight.group_size,
        TILE_OUTPUTS=config.tile_outputs, BLOCKS=config.blocks, ASM=use_asm, PDL=pdl, num_warps=config.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
