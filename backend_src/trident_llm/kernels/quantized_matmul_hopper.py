"""Products with quantized weights on Hopper, by warps of different duties, in Gluon.

One warp brings words through the tensor memory accelerator, one brings x; two groups of four warps unpack words in the
registers from which the matrix instruction reads its left operand, and one group unpacks while the other multiplies.
Programs stay for several tiles, so the next one's words are under way while the last one's sums are written.
Knows nothing of the layer it serves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents

from .checks import HALF_DTYPES, check_dtype, check_last_contiguous, check_product
from .hopper_multiply import CHUNK, load_words, load_x, multiply_tiles
from .hopper_tiles import num_splits
from .packed_weight import PackedWeight

_MULTIPLYING_REGISTERS, _LOADING_REGISTERS = 240, 24
"""Of a thread. Two groups of warps multiply, and together with the loading ones share 504."""
_ROWS_LAYOUT = gl.NVMMASharedLayout(128, 16, rank=2)


@dataclass(frozen=True)
class HopperMatmulConfig:
    panels: int
    """Of 64 outputs, for each of two groups of warps: 1 or 2."""
    tile_rows: int
    x_stages: int
    """Of 64 inputs."""
    word_stages: int
    """Of a block of inputs."""
    num_splits: int = 1
    """Programs that share the columns of a weight row; each writes its own part of the sum."""


MAX_ROWS = 4096
"""With more it pays to unpack the weight once, to memory, for cuBLAS."""


def default_config(
    weight: PackedWeight, num_rows: int, num_processors: int, *, silu_and_mul: bool = False
) -> HopperMatmulConfig:
    """The fastest of those timed on an H200 for the shapes of Mistral-7B; as many splits as find a multiprocessor."""
    if num_rows <= 16:
        config = HopperMatmulConfig(2, 16, 8, 3)
    elif num_rows <= 64:
        config = HopperMatmulConfig(2, max(32, triton.next_power_of_2(num_rows)), 12, 3)
    elif num_rows <= 128 and (silu_and_mul or weight.num_outputs >= 128 * num_processors):
        config = HopperMatmulConfig(2, 128, 6, 3)
    elif num_rows <= 128:
        config = HopperMatmulConfig(1, 128, 8, 4)
    else:
        config = HopperMatmulConfig(1, 256, 4, 4)
    if silu_and_mul:
        return config
    num_tiles = triton.cdiv(num_rows, config.tile_rows) * triton.cdiv(weight.num_outputs, 128 * config.panels)
    splits = num_splits(num_rows, num_tiles, weight.low.shape[1], num_processors)
    return replace(config, num_splits=splits)


def takes(x: Tensor, weight: PackedWeight) -> bool:
    """Whether the kernel multiplies these, on a device of compute capability 9.0: 4 or 8 bits, whole groups or blocks,
    and rows of x that lie as the tensor memory accelerator wants them."""
    if x.dtype not in HALF_DTYPES or weight.bits not in (4, 8) or weight.chunk != CHUNK.value:
        return False
    block = 16 // weight.bits * CHUNK.value
    whole = weight.group_size == weight.num_inputs
    fits = whole or weight.group_size % block == 0 or block % weight.group_size == 0
    # What an order of the inputs gathers of x has no gaps.
    stride = x.stride(0) if weight.input_order is None else weight.num_inputs
    return fits and x.stride(1) == 1 and stride % 8 == 0 and x.data_ptr() % 16 == 0


@gluon.jit(do_not_specialize=["num_rows", "num_inputs", "row_tiles", "output_tiles", "splits", "blocks"])
def _hopper_quantized_matmul_kernel(
    x_rows,  # [num_rows, num_inputs], in boxes of [TILE_ROWS, 64]
    word_rows,  # [panels * blocks * 64, 64] int16, in boxes of [64, 64]; panels of gate first with SILU, then of up
    scales_and_zeros,  # [groups, num_outputs] int32; [groups, 2 * num_outputs] with SILU
    bias,  # [num_outputs]; unused unless HAS_BIAS
    out,  # [num_rows, num_outputs]; [splits, num_rows, num_outputs] float32 with several splits
    num_rows,
    num_outputs,
    num_inputs,
    row_tiles,
    output_tiles,
    splits,
    blocks,
    stride_groups,
    stride_out,
    stride_split,
    BITS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    PANELS: gl.constexpr,
    X_STAGES: gl.constexpr,
    W_STAGES: gl.constexpr,
    MULTIPLYING_REGISTERS: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SILU: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    DTYPE: gl.constexpr = x_rows.dtype
    TILE_ROWS: gl.constexpr = x_rows.block_shape[0]
    VALUES: gl.constexpr = 16 // BITS
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    x_shared = gl.allocate_shared_memory(DTYPE, [X_STAGES, TILE_ROWS, CHUNK], x_rows.layout)
    words_shared = gl.allocate_shared_memory(gl.int16, [W_STAGES * 2 * PANELS, CHUNK, CHUNK], word_rows.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], BARRIER)
    x_empty = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], BARRIER)
    words_full = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], BARRIER)
    words_empty = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], BARRIER)
    for index in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(index), count=1)
        mbarrier.init(x_empty.index(index), count=2)
    for index in gl.static_range(W_STAGES):
        mbarrier.init(words_full.index(index), count=1)
        mbarrier.init(words_empty.index(index), count=2)
    fence_async_shared()
    ring = (x_shared, x_full, x_empty, words_shared, words_full, words_empty)
    work = (row_tiles, output_tiles, splits, blocks)
    sizes = (num_rows, num_outputs, num_inputs)
    strides = (stride_groups, stride_out, stride_split)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (multiply_tiles, (
                out, bias, scales_and_zeros, ring, work, sizes, strides,
                BITS, GROUP_SIZE, PANELS, DTYPE, HAS_BIAS, SILU, first,
            )),
            (multiply_tiles, (
                out, bias, scales_and_zeros, ring, work, sizes, strides,
                BITS, GROUP_SIZE, PANELS, DTYPE, HAS_BIAS, SILU, second,
            )),
            (load_words, (word_rows, ring, work, num_outputs, PANELS, SILU)),
            (load_x, (x_rows, ring, work, VALUES, PDL)),
        ],
        [4, 1, 1],
        [MULTIPLYING_REGISTERS, LOADING_REGISTERS, LOADING_REGISTERS],
    )  # fmt: skip


def quantized_matmul_hopper(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    silu_and_mul: bool = False,
    num_processors: int,
    config: HopperMatmulConfig | None = None,
    pdl: bool = False,
) -> None:
    """``quantized_matmul`` for what ``takes`` accepts, with arguments as there.

    num_processors: multiprocessors of the device. silu_and_mul wants outputs in whole panels.
    """
    num_rows, num_inputs = x.shape
    num_outputs = out.shape[-1]
    config = config or default_config(weight, num_rows, num_processors, silu_and_mul=silu_and_mul)
    check_dtype("x", x, HALF_DTYPES)
    if weight.shape != ((2 if silu_and_mul else 1) * num_outputs, num_inputs) or not takes(x, weight):
        raise ValueError(f"weight is {weight.shape} of {weight.bits} bits, x {tuple(x.shape)}, out {tuple(out.shape)}")
    check_product(out, num_rows, num_splits=config.num_splits, has_bias=bias is not None, silu_and_mul=silu_and_mul)
    check_last_contiguous("out", out)
    if silu_and_mul and (num_outputs % CHUNK.value or config.panels != 2):
        raise ValueError(f"silu_and_mul takes two panels and outputs in whole ones, not {num_outputs}")
    outputs = CHUNK.value * (2 if silu_and_mul else 2 * config.panels)
    row_tiles, output_tiles = triton.cdiv(num_rows, config.tile_rows), triton.cdiv(num_outputs, outputs)
    x_rows = TensorDescriptor(
        x, [num_rows, num_inputs], [x.stride(0), 1], [config.tile_rows, CHUNK.value], _ROWS_LAYOUT
    )
    words = weight.low.view(-1, CHUNK.value)
    word_rows = TensorDescriptor(
        words, list(words.shape), [CHUNK.value, 1], [CHUNK.value, CHUNK.value], _ROWS_LAYOUT
    )  # fmt: skip
    programs = min(row_tiles * output_tiles * config.num_splits, num_processors)
    scales_and_zeros = weight.scales_and_zeros
    _hopper_quantized_matmul_kernel[(programs,)](
        x_rows, word_rows, scales_and_zeros, bias, out, num_rows, num_outputs, num_inputs, row_tiles, output_tiles,
        config.num_splits, weight.low.shape[1], scales_and_zeros.stride(0), out.stride(-2),
        out.stride(0) if config.num_splits > 1 else 0,
        BITS=weight.bits, GROUP_SIZE=0 if weight.group_size == num_inputs else weight.group_size, PANELS=config.panels,
        X_STAGES=config.x_stages, W_STAGES=config.word_stages, MULTIPLYING_REGISTERS=_MULTIPLYING_REGISTERS,
        LOADING_REGISTERS=_LOADING_REGISTERS, HAS_BIAS=bias is not None, SILU=silu_and_mul, PDL=pdl, num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
