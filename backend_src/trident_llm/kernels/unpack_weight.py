"""A packed weight written out whole: for products of so many rows that cuBLAS reading it again costs less."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape
from .packed_weight import PackedWeight
from .unpack_codes import scales_of, unpack

_TILE_OUTPUTS = 32


@triton.jit
def _unpack_weight_kernel(
    low,  # [panels, blocks, 64, CHUNK] int16, outputs in panels of 64
    high,  # the second plane, [panels, blocks, 64, CHUNK] int16; unused unless BITS is 5 or 6
    scales_and_zeros,  # [groups, num_outputs] int32
    out,  # [num_outputs, NUM_INPUTS]
    num_outputs,
    stride_low,
    stride_high,
    stride_groups,
    stride_out,
    NUM_INPUTS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    DTYPE: tl.constexpr = tl.float16 if out.dtype.element_ty == tl.float32 else out.dtype.element_ty
    VALUES: tl.constexpr = 2 if BITS == 8 else 4
    PER_WORD: tl.constexpr = 2 if BITS == 6 else 4
    NUM_GROUPS: tl.constexpr = (NUM_INPUTS + GROUP_SIZE - 1) // GROUP_SIZE
    block = tl.program_id(1)
    outputs = (tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)).to(tl.int64)
    inside = (outputs < num_outputs)[:, None]
    columns = tl.arange(0, CHUNK)[None, :]
    in_panel = (outputs % 64 * CHUNK)[:, None] + columns
    panels = (outputs // 64)[:, None]
    words = tl.load(low + panels * stride_low + block * 64 * CHUNK + in_panel, mask=inside, other=0)
    extra = words
    if BITS == 5 or BITS == 6:
        pointers = high + panels * stride_high + block // PER_WORD * 64 * CHUNK + in_panel
        extra = tl.load(pointers, mask=inside, other=0)
    if PDL:
        # The memory written may still be read by the product launched before.
        gdc_wait()
    for j in tl.static_range(VALUES):
        first = (block * VALUES + j) * CHUNK
        group = tl.minimum(first // GROUP_SIZE, NUM_GROUPS - 1)
        pointers = scales_and_zeros + group * stride_groups + outputs
        pairs = tl.load(pointers, mask=outputs < num_outputs, other=0)
        shift = (block % PER_WORD * 4 + j) * (BITS - 4)
        weight = unpack(words, extra, pairs, j, shift, BITS, False, DTYPE, ASM).to(tl.float32)
        weight *= scales_of(pairs)[:, None]
        target = out + outputs[:, None] * stride_out + first + columns
        tl.store(target, weight.to(out.dtype.element_ty), mask=inside & (first + columns < NUM_INPUTS))


def unpack_weight(weight: PackedWeight, out: Tensor, *, pdl: bool = False, use_asm: bool = True) -> None:
    """The weight, dequantized in float32, into out [out, in] of bf16, fp16 or fp32; columns in the packed order.

    use_asm: off where there is no GPU.
    """
    check_dtype("out", out, FLOAT_DTYPES)
    check_shape("out", out, weight.shape)
    check_last_contiguous("out", out)
    num_outputs, num_inputs = weight.shape
    high = weight.low if weight.high is None else weight.high
    block_inputs = (2 if weight.bits == 8 else 4) * weight.chunk
    _unpack_weight_kernel[(triton.cdiv(num_outputs, _TILE_OUTPUTS), triton.cdiv(num_inputs, block_inputs))](
        weight.low, high, weight.scales_and_zeros, out, num_outputs, weight.low.stride(0), high.stride(0),
        weight.scales_and_zeros.stride(0), out.stride(0),
        NUM_INPUTS=num_inputs, BITS=weight.bits, CHUNK=weight.chunk, GROUP_SIZE=weight.group_size,
        TILE_OUTPUTS=_TILE_OUTPUTS, ASM=use_asm, PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
