"""Products of very few rows with quantized weights, in Gluon (the Triton language with layouts spelled out).

Each warp loads its share of a weight row's columns from memory straight into the registers from which the matrix
instruction reads its left operand; no word passes through shared memory, and no warp waits for another before the end,
where the warps' sums are added up. With programmatic dependent launch all of a program's first loads are under way
while the previous kernel still runs. Bound by memory bandwidth. Knows nothing of the layer it serves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import HALF_DTYPES, check_dtype, check_last_contiguous, check_shape
from .packed_bytes import PackedBytes
from .packed_weight import PackedWeight
from .unpack_codes import byte_text, offset_base, unpack_text

MAX_ROWS = 16
MAX_SHARED_ROWS = 8
"""With more, a kernel whose programs share the sums is faster where something adds them up for nothing."""
_CHUNK = 64
"""A warp's load of four threads times 16 bytes, twice: what the layout of the matrix instruction's operand needs."""


@dataclass(frozen=True)
class VectorConfig:
    tile_outputs: int
    """Weight rows per program, gate and up counted each."""
    num_warps: int
    """Each takes an equal share of the columns."""
    depth: int
    """Blocks of words that a warp has under way."""


def default_config(num_inputs: int, bits: int) -> VectorConfig:
    """The fastest of those timed on an H100 for the shapes of Mistral-7B."""
    blocks = num_inputs // block_inputs(bits)
    if bits == 8 and blocks % 8 == 0:
        return VectorConfig(16, 8, min(2, blocks // 8))
    warps = next(warps for warps in (4, 2, 1) if blocks % warps == 0)
    return VectorConfig(16, warps, min(4 if blocks <= 16 else 7, blocks // warps))


def block_inputs(bits: int) -> int:
    """Inputs that a block of words covers."""
    return _CHUNK * 16 // bits


@dataclass(frozen=True)
class _Words:
    """A weight as the kernel reads it."""

    low: Tensor
    scales: Tensor
    format: str
    bits: int
    group_size: int
    strides: tuple[int, int, int, int]
    """Of panel, block and output in words; of group in scales."""


def _words(weight: PackedWeight | PackedBytes) -> _Words:
    if isinstance(weight, PackedWeight):
        strides = (weight.low.stride(0), weight.low.stride(1), weight.low.stride(2), weight.scales_and_zeros.stride(0))
        return _Words(weight.low, weight.scales_and_zeros, "codes", weight.bits, weight.group_size, strides)
    codes = weight.codes.view(torch.int16)
    kind = "int8" if weight.codes.dtype == torch.int8 else "fp8"
    strides = (64 * codes.stride(0), _CHUNK, codes.stride(0), 0)
    return _Words(codes, weight.scales, kind, 8, weight.num_inputs, strides)


def supports(weight: PackedWeight | PackedBytes) -> bool:
    """Whether the kernel reads this weight: 4 or 8 bits, whole blocks, and no group within a load."""
    num_outputs, num_inputs = weight.shape
    if isinstance(weight, PackedBytes):
        return num_inputs % block_inputs(8) == 0 and num_outputs % 32 == 0
    whole = num_inputs % block_inputs(weight.bits) == 0 and num_outputs % 32 == 0
    return weight.bits in (4, 8) and weight.chunk == _CHUNK and whole


@gluon.jit
def _numbers(words, offsets, VALUE: gl.constexpr, BITS: gl.constexpr, DTYPE: gl.constexpr):
    """As ``unpack_codes.unpack``; offsets of the same shape."""
    TEXT: gl.constexpr = unpack_text(BITS, VALUE, DTYPE.is_fp16())
    pair = gl.inline_asm_elementwise(TEXT, "=r,r,r", [words, offsets], dtype=gl.int16, is_pure=True, pack=2)
    return pair.to(DTYPE, bitcast=True)


@gluon.jit
def _bytes(words, VALUE: gl.constexpr, IS_INT8: gl.constexpr, DTYPE: gl.constexpr):
    """Numbers of ``PackedBytes``."""
    TEXT: gl.constexpr = byte_text(VALUE, IS_INT8, DTYPE.is_fp16())
    pair = gl.inline_asm_elementwise(TEXT, "=r,r", [words], dtype=gl.int16, is_pure=True, pack=2)
    return pair.to(DTYPE, bitcast=True)


@gluon.jit
def _quantized_vector_kernel(
    x,  # [num_rows, NUM_INPUTS]
    low,  # [panels, blocks, 64, 64] int16, with strides for panel, block and output; bytes: FORMAT "int8" or "fp8"
    scales,  # [groups, num_outputs] int32, with zeros; of bytes [num_outputs] float32; twice the outputs with SILU
    bias,  # [num_outputs]; unused unless HAS_BIAS
    out,  # [num_rows, num_outputs]
    num_outputs,
    num_rows,
    stride_x,
    stride_panel,
    stride_block,
    stride_output,
    stride_groups,
    stride_out,
    NUM_INPUTS: gl.constexpr,
    FORMAT: gl.constexpr,
    BITS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    TILE_OUTPUTS: gl.constexpr,
    PADDED_ROWS: gl.constexpr,
    WARPS: gl.constexpr,
    DEPTH: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SILU: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    DTYPE: gl.constexpr = x.dtype.element_ty
    # Dimensions: share of the columns (a warp each), output, column; the matrix instruction runs once per share.
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 8)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 8)
    VALUES: gl.constexpr = 16 // BITS
    BLOCK: gl.constexpr = 64 * VALUES
    SHARE: gl.constexpr = NUM_INPUTS // BLOCK // WARPS
    # Groups: per block where one spans no more than a block, else blocks per group.
    GROUPS: gl.constexpr = BLOCK // GROUP_SIZE if GROUP_SIZE < BLOCK else 1
    VALUES_PER_GROUP: gl.constexpr = VALUES // GROUPS
    HALF: gl.constexpr = TILE_OUTPUTS // 2 if SILU else TILE_OUTPUTS

    share = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LEFT)))[:, None]
    row = gl.arange(0, TILE_OUTPUTS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))[None, :]
    outputs = gl.program_id(0) * HALF + row % HALF + row // HALF * num_outputs
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(1, LEFT)))[None, None, :]
    panels = (outputs // 64).to(gl.int64) * stride_panel + outputs % 64 * stride_output
    words = low + (panels + share * SHARE * stride_block)[:, :, None] + column
    pairs = scales + outputs + share * 0
    loaded = ()  # type: tuple
    group_scales = ()  # type: tuple
    for block in gl.static_range(DEPTH):
        loaded = loaded + (gl.load(words + block * stride_block, eviction_policy="evict_first"),)
        if FORMAT == "codes":
            for group in gl.static_range(GROUPS):
                index = ((share * SHARE + block) * BLOCK + group * GROUP_SIZE) // GROUP_SIZE
                group_scales = group_scales + (gl.load(pairs + index * stride_groups),)
    if PDL:
        gdc_wait()

    x_share = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))[:, None, None]
    x_column = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))[None, :, None]
    x_row = gl.arange(0, PADDED_ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))[None, None, :]
    x_pointers = x + x_row * stride_x + x_share * (SHARE * BLOCK) + x_column
    x_mask = (x_row < num_rows) & (x_column >= 0) & (x_share >= 0)
    acc = gl.zeros([WARPS, TILE_OUTPUTS, PADDED_ROWS], gl.float32, layout=SUMS)
    for block in gl.static_range(SHARE):
        current = loaded[0]
        loaded = loaded[1:]
        if block + DEPTH < SHARE:
            loaded = loaded + (gl.load(words + (block + DEPTH) * stride_block, eviction_policy="evict_first"),)
        if FORMAT != "codes":
            for value in gl.static_range(VALUES):
                values = gl.load(x_pointers + block * BLOCK + value * 64, mask=x_mask, other=0.0)
                acc = gl.nvidia.ampere.mma_v2(_bytes(current, value, FORMAT == "int8", DTYPE), values, acc)
        else:
            for group in gl.static_range(GROUPS):
                pair = group_scales[0]
                group_scales = group_scales[1:]
                if block + DEPTH < SHARE:
                    index = ((share * SHARE + block + DEPTH) * BLOCK + group * GROUP_SIZE) // GROUP_SIZE
                    group_scales = group_scales + (gl.load(pairs + index * stride_groups),)
                offsets = ((pair >> 16) + offset_base(BITS, DTYPE.is_fp16())).to(DTYPE)
                offsets = gl.broadcast(offsets[:, :, None], current)[0]
                sums = gl.zeros([WARPS, TILE_OUTPUTS, PADDED_ROWS], gl.float32, layout=SUMS)
                for value in gl.static_range(VALUES_PER_GROUP):
                    number = group * VALUES_PER_GROUP + value
                    values = gl.load(x_pointers + block * BLOCK + number * 64, mask=x_mask, other=0.0)
                    left = _numbers(current, offsets, group * VALUES_PER_GROUP + value, BITS, DTYPE)
                    sums = gl.nvidia.ampere.mma_v2(left, values, sums)
                scale = gl.convert_layout(pair & 0xFFFF, gl.SliceLayout(2, SUMS))
                scale = scale.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
                acc += sums * scale[:, :, None]
    total = gl.sum(acc, axis=0)
    if FORMAT != "codes":
        tile_row = gl.arange(0, TILE_OUTPUTS, layout=gl.SliceLayout(1, gl.SliceLayout(0, SUMS)))
        scaled_output = gl.program_id(0) * HALF + tile_row % HALF + tile_row // HALF * num_outputs
        total *= gl.load(scales + scaled_output)[:, None]
    if SILU:
        gate, up = gl.split(gl.permute(gl.reshape(total, [2, HALF, PADDED_ROWS]), (1, 2, 0)))
        # Rounded in between as two kernels would round: the fusion does not change the result.
        gate = gate.to(out.dtype.element_ty).to(gl.float32)
        total = gate / (1.0 + gl.exp(-gate)) * up.to(out.dtype.element_ty).to(gl.float32)
    LAYOUT: gl.constexpr = total.type.layout
    output = (gl.program_id(0) * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT)))[:, None]
    out_row = gl.arange(0, PADDED_ROWS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    if HAS_BIAS:
        total += gl.load(bias + output).to(gl.float32)
    mask = (out_row < num_rows) & (output >= 0)
    gl.store(out + out_row * stride_out + output, total.to(out.dtype.element_ty), mask=mask)


def quantized_vector(
    x: Tensor,
    weight: PackedWeight | PackedBytes,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    silu_and_mul: bool = False,
    config: VectorConfig | None = None,
    pdl: bool = False,
) -> None:
    """x [T, in] times weight [out, in] transposed, plus bias [out], into out [T, out]; T at most ``MAX_ROWS``.

    For weights that ``supports`` accepts. silu_and_mul: weight is [2 * out, in], gate first, and out is
    silu(gate) * up; there is no bias then. bf16 or fp16, sums in float32. With pdl the weight must not be written by
    the kernel launched just before.
    """
    num_rows, num_inputs = x.shape
    num_outputs = out.shape[1]
    words = _words(weight)
    config = config or default_config(num_inputs, words.bits)
    check_dtype("x", x, HALF_DTYPES)
    check_shape("out", out, (num_rows, num_outputs))
    if weight.shape != ((2 if silu_and_mul else 1) * num_outputs, num_inputs) or not supports(weight):
        raise ValueError(f"weight is {weight.shape}, x {tuple(x.shape)} and out {tuple(out.shape)}")
    for name, tensor in (("x", x), ("out", out)):
        check_last_contiguous(name, tensor)
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"x has {num_rows} rows; allowed: 1 to {MAX_ROWS}")
    if silu_and_mul and bias is not None:
        raise ValueError("silu_and_mul takes no bias")
    _quantized_vector_kernel[(weight.shape[0] // config.tile_outputs,)](
        x, words.low, words.scales, bias, out, num_outputs, num_rows, x.stride(0), *words.strides, out.stride(0),
        NUM_INPUTS=num_inputs, FORMAT=words.format, BITS=words.bits, GROUP_SIZE=words.group_size,
        TILE_OUTPUTS=config.tile_outputs, PADDED_ROWS=8 if num_rows <= 8 else 16, WARPS=config.num_warps,
        DEPTH=config.depth, HAS_BIAS=bias is not None, SILU=silu_and_mul, PDL=pdl, num_warps=config.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
