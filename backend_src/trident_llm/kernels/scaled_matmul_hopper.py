"""Products of int8 activations with int8 weights on Hopper, by warps of different duties, in Gluon.

One warp brings tiles of both through the tensor memory accelerator, two groups of four warps multiply. Programs stay
for several tiles, so the next one's operands are under way while the last one's sums are written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_product, check_shape
from .hopper_barriers import begin_fill, release, wait_filled
from .hopper_tiles import count_items, locate_tile, num_splits, store_tile
from .packed_bytes import PackedBytes
from .quantized_rows import QuantizedRows

_MULTIPLYING_REGISTERS, _LOADING_REGISTERS = 232, 40
"""Of a thread. Two groups of warps multiply, and together with the loading one share 504."""
_BYTES_LAYOUT = gl.NVMMASharedLayout(128, 8, rank=2)
_CHUNK: gl.constexpr = gl.constexpr(128)
"""Inputs of a stage."""


@dataclass(frozen=True)
class HopperScaledConfig:
    group_outputs: int
    """Of each of two groups of warps: 64 or 128."""
    tile_rows: int
    num_stages: int
    """Of 128 inputs."""
    num_splits: int = 1
    """Programs that share the columns of a weight row; each writes its own part of the sum."""


_MAX_SPLITS = 4


def default_config(weight: PackedBytes, num_rows: int, num_processors: int) -> HopperScaledConfig:
    """The fastest of those timed on an H200 for the shapes of Mistral-7B; as many splits as find a multiprocessor."""
    num_outputs, num_inputs = weight.shape
    tile_rows = min(max(16, triton.next_power_of_2(num_rows)), 128)
    row_tiles = triton.cdiv(num_rows, tile_rows)
    if tile_rows == 128 and row_tiles * triton.cdiv(num_outputs, 256) >= num_processors:
        return HopperScaledConfig(128, 128, 4)
    config = HopperScaledConfig(64, tile_rows, 6 if tile_rows == 128 else 8)
    num_tiles = row_tiles * triton.cdiv(num_outputs, 128)
    splits = num_splits(num_rows, num_tiles, min(num_inputs // _CHUNK.value, _MAX_SPLITS), num_processors)
    return replace(config, num_splits=splits)


@gluon.jit
def _load_tiles(x_rows, weight_rows, ring, work, PDL: gl.constexpr):
    """What the loading warp does."""
    x_shared, w_shared, full, empty = ring
    TILE_ROWS: gl.constexpr = x_shared.shape[1]
    GROUP_OUTPUTS: gl.constexpr = w_shared.shape[1]
    if PDL:
        gdc_wait()
    num_items = count_items(work)
    count = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        row_tile, output_tile, _split, begin, end = locate_tile(item, work)
        for block in range(begin, end):
            stage = begin_fill(full, empty, count, (TILE_ROWS + 2 * GROUP_OUTPUTS) * _CHUNK)
            for group in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    weight_rows,
                    [(output_tile * 2 + group) * GROUP_OUTPUTS, block * _CHUNK],
                    full.index(stage),
                    w_shared.index(stage * 2 + group),
                )
            tma.async_copy_global_to_shared(
                x_rows, [row_tile * TILE_ROWS, block * _CHUNK], full.index(stage), x_shared.index(stage)
            )
            count += 1


@gluon.jit
def _multiply_tiles(
    out,
    bias,
    x_scales,
    weight_scales,
    ring,
    work,
    num_rows,
    num_outputs,
    stride_out,
    stride_split,
    HAS_BIAS: gl.constexpr,
    WARP_GROUP: gl.constexpr,
):
    """What group of warps 0 or 1 does. Arguments as in the kernel."""
    x_shared, w_shared, full, empty = ring
    STAGES: gl.constexpr = x_shared.shape[0]
    TILE_ROWS: gl.constexpr = x_shared.shape[1]
    GROUP_OUTPUTS: gl.constexpr = w_shared.shape[1]
    # The language knows no integer instruction for 256 rows.
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(TILE_ROWS, 128), 32])
    num_items = count_items(work)
    count = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        row_tile, output_tile, split, begin, end = locate_tile(item, work)
        sums = gl.zeros([GROUP_OUTPUTS, TILE_ROWS], gl.int32, layout=SUMS)
        for block in range(begin, end):
            stage = wait_filled(full, count)
            sums = warpgroup_mma(
                w_shared.index(stage * 2 + WARP_GROUP), x_shared.index(stage).permute((1, 0)), sums, is_async=True
            )
            # The product before is done, and with it its stage.
            sums = warpgroup_mma_wait(1, deps=(sums,))
            release(empty, (count + STAGES - 1) % STAGES, block > begin)
            count += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        release(empty, (count + STAGES - 1) % STAGES, end > begin)

        first_row = row_tile * TILE_ROWS
        first_output = (output_tile * 2 + WARP_GROUP) * GROUP_OUTPUTS
        outputs = first_output + gl.arange(0, GROUP_OUTPUTS, layout=gl.SliceLayout(1, SUMS))
        rows = first_row + gl.arange(0, TILE_ROWS, layout=gl.SliceLayout(0, SUMS))
        scales = gl.load(weight_scales + outputs, mask=outputs < num_outputs, other=0.0)[:, None]
        total = sums.to(gl.float32) * scales * gl.load(x_scales + rows, mask=rows < num_rows, other=0.0)[None, :]
        if HAS_BIAS:
            total += gl.load(bias + outputs, mask=outputs < num_outputs, other=0.0).to(gl.float32)[:, None]
        target = out + split.to(gl.int64) * stride_split + first_row.to(gl.int64) * stride_out + first_output
        store_tile(target, total, num_rows - first_row, num_outputs - first_output, stride_out)


@gluon.jit(do_not_specialize=["num_rows", "row_tiles", "output_tiles", "splits", "blocks"])
def _hopper_scaled_matmul_kernel(
    x_rows,  # [num_rows, num_inputs] int8, in boxes of [TILE_ROWS, 128]
    weight_rows,  # [num_outputs, num_inputs] int8, in boxes of [outputs of a group of warps, 128]
    x_scales,  # [num_rows] float32
    weight_scales,  # [num_outputs] float32
    bias,  # [num_outputs]; unused unless HAS_BIAS
    out,  # [num_rows, num_outputs]; [splits, num_rows, num_outputs] float32 with several splits
    num_rows,
    num_outputs,
    row_tiles,
    output_tiles,
    splits,
    blocks,
    stride_out,
    stride_split,
    STAGES: gl.constexpr,
    MULTIPLYING_REGISTERS: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    x_shared = gl.allocate_shared_memory(gl.int8, [STAGES, x_rows.block_shape[0], _CHUNK], x_rows.layout)
    w_shared = gl.allocate_shared_memory(gl.int8, [2 * STAGES, weight_rows.block_shape[0], _CHUNK], weight_rows.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for index in gl.static_range(STAGES):
        mbarrier.init(full.index(index), count=1)
        mbarrier.init(empty.index(index), count=2)
    fence_async_shared()
    ring = (x_shared, w_shared, full, empty)
    work = (row_tiles, output_tiles, splits, blocks)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_multiply_tiles, (
                out, bias, x_scales, weight_scales, ring, work, num_rows, num_outputs, stride_out, stride_split,
                HAS_BIAS, first,
            )),
            (_multiply_tiles, (
                out, bias, x_scales, weight_scales, ring, work, num_rows, num_outputs, stride_out, stride_split,
                HAS_BIAS, second,
            )),
            (_load_tiles, (x_rows, weight_rows, ring, work, PDL)),
        ],
        [4, 1],
        [MULTIPLYING_REGISTERS, LOADING_REGISTERS],
    )  # fmt: skip


def scaled_matmul_hopper(
    x: QuantizedRows,
    weight: PackedBytes,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    num_processors: int,
    config: HopperScaledConfig | None = None,
    pdl: bool = False,
) -> None:
    """``scaled_matmul`` of int8, with arguments as there, on a device of compute capability 9.0.

    num_processors: multiprocessors of the device. With ``config.num_splits`` above 1 out is [num_splits, T, out]
    float32, and its sum over the first dimension is the product; there is no bias then.
    """
    num_rows, num_inputs = x.values.shape
    num_outputs = weight.shape[0]
    config = config or default_config(weight, num_rows, num_processors)
    check_dtype("x", x.values, (torch.int8,))
    check_dtype("weight", weight.codes, (torch.int8,))
    check_shape("weight", weight.codes, (num_outputs, num_inputs))
    check_dtype("out", out, FLOAT_DTYPES)
    check_product(out, num_rows, num_splits=config.num_splits, has_bias=bias is not None, silu_and_mul=False)
    check_last_contiguous("out", out)
    row_tiles = triton.cdiv(num_rows, config.tile_rows)
    output_tiles = triton.cdiv(num_outputs, 2 * config.group_outputs)
    x_rows = TensorDescriptor(
        x.values, [num_rows, num_inputs], [num_inputs, 1], [config.tile_rows, _CHUNK.value], _BYTES_LAYOUT
    )  # fmt: skip
    weight_rows = TensorDescriptor(
        weight.codes, [num_outputs, num_inputs], [num_inputs, 1], [config.group_outputs, _CHUNK.value], _BYTES_LAYOUT
    )  # fmt: skip
    programs = min(row_tiles * output_tiles * config.num_splits, num_processors)
    _hopper_scaled_matmul_kernel[(programs,)](
        x_rows, weight_rows, x.scales, weight.scales, bias, out, num_rows, num_outputs, row_tiles, output_tiles,
        config.num_splits, num_inputs // _CHUNK.value, out.stride(-2), out.stride(0) if config.num_splits > 1 else 0,
        STAGES=config.num_stages,
        MULTIPLYING_REGISTERS=_MULTIPLYING_REGISTERS, LOADING_REGISTERS=_LOADING_REGISTERS,
        HAS_BIAS=bias is not None, PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
