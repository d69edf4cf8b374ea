"""Products with 16-bit weights on Hopper, by warps of different duties, in Gluon.

One warp brings tiles of the weight through the tensor memory accelerator, one brings x, one or two groups of four warps
multiply. The weight is the left operand of the matrix instruction, so few rows of x fill its short side instead of
padding its long one. The first tiles of the weight are under way while the previous kernel still runs. Low-rank
updates are more columns of the same sums (``lora_updates``). Knows nothing of the layer it serves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import lora_updates
from .checks import HALF_DTYPES, check_dtype, check_last_contiguous, check_product, check_shape
from .hopper_barriers import begin_fill, release, wait_filled
from .hopper_tiles import count_items, locate_panel, locate_tile, num_splits, store_tile, wait_for_products
from .lora import READ_COLUMNS
from .lora_layer import LoraLayer
from .lora_updates import Updates, update_arguments

_CHUNK: gl.constexpr = gl.constexpr(64)
"""Inputs of a stage, ``READ_COLUMNS`` of updates, and outputs of a panel."""
_MULTIPLYING_REGISTERS, _LOADING_REGISTERS = 240, 24
"""Of a thread. Two groups of warps multiply, and together with the loading ones share 504."""
_REGISTERS = {1: 128, 2: 168}
"""Of a thread by number of groups, as long as no warps have given up theirs."""
_LAYOUT = gl.NVMMASharedLayout(128, 16, rank=2)


@dataclass(frozen=True)
class HopperProductConfig:
    groups: int
    """Of four warps that multiply: 1 or 2."""
    panels: int
    """Of 64 outputs, for each group; with SiLU half of them are of gate, half of up."""
    tile_rows: int
    num_stages: int
    """Of 64 inputs."""
    num_splits: int = 1
    """Programs that share the columns of a weight row; each writes its own part of the sum."""

    @property
    def tile_outputs(self) -> int:
        """Rows of the weight that are multiplied together."""
        return self.groups * self.panels * _CHUNK.value


_MAX_ROWS = 128
_MAX_WHOLE_ROWS = 64
"""With more rows cuBLAS is as fast where nothing is fused and no sum is shared out."""
_RING_BYTES = 200 * 1024
"""Of shared memory; the rest is for sums on their way to memory."""


def default_config(
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    num_processors: int,
    *,
    silu_and_mul: bool = False,
    may_split: bool = False,
    has_updates: bool = False,
) -> HopperProductConfig | None:
    """The fastest of those timed on an H200 for the shapes of Mistral-7B; None where that is cuBLAS."""
    is_whole = not (silu_and_mul or may_split or has_updates)
    if num_rows > (_MAX_WHOLE_ROWS if is_whole else _MAX_ROWS):
        return None
    tile_rows = max(16, triton.next_power_of_2(num_rows))
    groups, panels = 1, 1
    if silu_and_mul:
        # Updates in four panels of 64 rows would take more registers than there are.
        groups, panels = (2, 2) if tile_rows == 128 else (1, 2 if tile_rows == 64 else 4)
    elif may_split:
        panels = 2 if tile_rows <= 32 else 1
    elif tile_rows <= 64 and num_outputs >= 128 * num_processors:
        panels = 2
    stage_bytes = (groups * panels * _CHUNK.value + tile_rows) * _CHUNK.value * 2
    config = HopperProductConfig(groups, panels, tile_rows, _RING_BYTES // stage_bytes)
    if not may_split:
        return config
    num_tiles = triton.cdiv(num_outputs, config.tile_outputs)
    splits = num_splits(num_rows, num_tiles, triton.cdiv(num_inputs, _CHUNK.value), num_processors)
    return replace(config, num_splits=splits)


def takes(x: Tensor, weight: Tensor, *, silu_and_mul: bool = False) -> bool:
    """Whether the kernel multiplies these, on a device of compute capability 9.0: 16 bits, rows that lie as the tensor
    memory accelerator wants them, and with SiLU outputs in whole panels."""
    whole = not silu_and_mul or weight.shape[0] % (2 * _CHUNK.value) == 0
    return whole and x.dtype in HALF_DTYPES and weight.dtype == x.dtype and _lies_well(x) and _lies_well(weight)


def takes_updates(layer: LoraLayer, tile_outputs: int) -> bool:
    """Whether the kernel adds a layer's updates to its product, by tiles of so many outputs."""
    return lora_updates.takes_updates(layer, tile_outputs) and len(layer.ranks) * layer.b.shape[2] % 8 == 0


def _lies_well(rows: Tensor) -> bool:
    return rows.dim() == 2 and rows.stride(1) == 1 and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0


@gluon.jit
def _used_columns(
    tile_slots,  # [1 + tiles, NUM_SLOTS] int32
    ranks,  # [NUM_SLOTS] int32
    NUM_SLOTS: gl.constexpr,
    MAX_RANK: gl.constexpr,
    PADDED_SLOTS: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    """An int64 with a bit for each ``READ_COLUMNS`` of all slots' ranks of which any row takes one."""
    slots = gl.arange(0, PADDED_SLOTS, layout=gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
    own = gl.load(tile_slots + slots, mask=slots < NUM_SLOTS, other=-1)
    rank = gl.load(ranks + slots, mask=own >= 0, other=0)
    begin = slots * MAX_RANK
    end = begin + rank
    used = gl.max(rank, axis=0).to(gl.int64) * 0
    for column in gl.static_range((NUM_SLOTS * MAX_RANK + READ_COLUMNS - 1) // READ_COLUMNS):
        overlaps = (rank > 0) & (begin < (column + 1) * READ_COLUMNS) & (end > column * READ_COLUMNS)
        used += gl.max(overlaps.to(gl.int32), axis=0).to(gl.int64) << column
    return used


@gluon.jit
def _part(first_output, parts):
    """The part of a layer that an output belongs to. parts: sizes of the first two, their number, and of splits of what
    shrink has made."""
    return (first_output >= parts[0]).to(gl.int32) + (first_output >= parts[0] + parts[1]).to(gl.int32)


@gluon.jit
def _load_weights(
    weight_rows,
    b_rows,
    tile_slots,
    ranks,
    ring,
    work,
    parts,
    num_outputs,
    PANELS: gl.constexpr,
    SILU: gl.constexpr,
    UPDATES: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """What the warp does that loads weights. They are constant: it waits for no earlier kernel."""
    _x, w_shared, full, empty = ring
    splits = work[2]
    num_items = count_items(work)
    HALVES: gl.constexpr = 2 if SILU else 1
    count = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        _row_tile, output_tile, split, begin, end = locate_tile(item, work)
        for block in range(begin, end):
            stage = begin_fill(full, empty, count, PANELS * _CHUNK * _CHUNK * 2)
            for index in gl.static_range(PANELS):
                panel = locate_panel(output_tile, index, num_outputs, PANELS, SILU)
                tma.async_copy_global_to_shared(
                    weight_rows, [panel * _CHUNK, block * _CHUNK], full.index(stage),
                    w_shared.index(stage * PANELS + index),
                )  # fmt: skip
            count += 1
        if UPDATES:
            COLUMNS: gl.constexpr = (SLOTS[0] * SLOTS[1] + READ_COLUMNS - 1) // READ_COLUMNS
            used = _used_columns(tile_slots, ranks, SLOTS[0], SLOTS[1], SLOTS[2], 1)
            for number in range(split, COLUMNS * parts[3], splits):
                column = number % COLUMNS
                if ((used >> column) & 1) != 0:
                    for half in gl.static_range(HALVES):
                        stage = begin_fill(full, empty, count, PANELS // HALVES * _CHUNK * _CHUNK * 2)
                        for index in gl.static_range(half, PANELS, HALVES):
                            panel = locate_panel(output_tile, index, num_outputs, PANELS, SILU)
                            tma.async_copy_global_to_shared(
                                b_rows, [panel * _CHUNK, column * READ_COLUMNS], full.index(stage),
                                w_shared.index(stage * PANELS + index),
                            )  # fmt: skip
                        count += 1


@gluon.jit
def _load_x(
    x_rows,
    hidden_rows,
    tile_slots,
    ranks,
    ring,
    work,
    parts,
    num_rows,
    num_outputs,
    PANELS: gl.constexpr,
    SILU: gl.constexpr,
    PDL: gl.constexpr,
    UPDATES: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """What the warp does that loads x, and what shrink has made of it."""
    x_shared, _w, full, empty = ring
    TILE_ROWS: gl.constexpr = x_shared.shape[1]
    splits = work[2]
    num_items = count_items(work)
    # Shrink lets this kernel begin when x is there.
    if PDL and not UPDATES:
        gdc_wait()
    count = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        row_tile, output_tile, split, begin, end = locate_tile(item, work)
        for block in range(begin, end):
            stage = begin_fill(full, empty, count, TILE_ROWS * _CHUNK * 2)
            tma.async_copy_global_to_shared(
                x_rows, [row_tile * TILE_ROWS, block * _CHUNK], full.index(stage), x_shared.index(stage)
            )
            count += 1
        if UPDATES:
            COLUMNS: gl.constexpr = (SLOTS[0] * SLOTS[1] + READ_COLUMNS - 1) // READ_COLUMNS
            used = _used_columns(tile_slots, ranks, SLOTS[0], SLOTS[1], SLOTS[2], 1)
            if PDL:
                gdc_wait()
            for number in range(split, COLUMNS * parts[3], splits):
                column = number % COLUMNS
                if ((used >> column) & 1) != 0:
                    for half in gl.static_range(2 if SILU else 1):
                        first_output = locate_panel(output_tile, half, num_outputs, PANELS, SILU) * _CHUNK
                        part = number // COLUMNS * parts[2] + _part(first_output, parts)
                        stage = begin_fill(full, empty, count, TILE_ROWS * _CHUNK * 2)
                        tma.async_copy_global_to_shared(
                            hidden_rows, [part * num_rows, column * READ_COLUMNS], full.index(stage),
                            x_shared.index(stage),
                        )  # fmt: skip
                        count += 1


@gluon.jit
def _gain(
    gains, has_gains, weights, tile_slots, ranks, first_output, num_rows, num_outputs, num_slots, stride_row,
    TILE_ROWS: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """[64, TILE_ROWS]: what W x grows by (DoRA's gains), of the slots that any row takes. weights: of this part."""
    # Every thread finds one number's place; as the sums lie it would find dozens.
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    outputs = first_output + gl.arange(0, _CHUNK, layout=LINE)
    rows = gl.arange(0, TILE_ROWS, layout=LINE)
    gain = gl.zeros([_CHUNK, TILE_ROWS], gl.float32, layout=SUMS)
    for slot in range(0, num_slots):
        if (gl.load(tile_slots + slot) >= 0) & (gl.load(ranks + slot) > 0) & (gl.load(has_gains + slot) != 0):
            of_slot = gl.load(gains + slot * num_outputs.to(gl.int64) + outputs, mask=outputs < num_outputs, other=0.0)
            weight = gl.load(weights + rows * stride_row + slot, mask=rows < num_rows, other=0.0)
            of_slot = gl.convert_layout(of_slot, gl.SliceLayout(1, SUMS))
            gain += of_slot[:, None] * gl.convert_layout(weight, gl.SliceLayout(0, SUMS))[None, :]
    return gain


@gluon.jit
def _multiply_tiles(
    out,
    bias,
    gains,
    has_gains,
    weights,
    tile_slots,
    ranks,
    ring,
    work,
    parts,
    sizes,  # num_rows, num_outputs, layer_outputs, num_slots
    strides,  # of out's rows and parts, of weights' parts and rows
    GROUP: gl.constexpr,
    PANELS: gl.constexpr,
    TILE_PANELS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SILU: gl.constexpr,
    UPDATES: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """What group of warps number GROUP does. Arguments as in the kernel."""
    x_shared, w_shared, full, empty = ring
    num_rows, num_outputs, layer_outputs, num_slots = sizes
    stride_out, stride_split, stride_weights_part, stride_weights_row = strides
    STAGES: gl.constexpr = x_shared.shape[0]
    TILE_ROWS: gl.constexpr = x_shared.shape[1]
    HALVES: gl.constexpr = 2 if SILU else 1
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_ROWS, 16])
    splits = work[2]
    num_items = count_items(work)
    count = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        row_tile, output_tile, split, begin, end = locate_tile(item, work)
        sums = ()  # type: tuple
        for _ in gl.static_range(PANELS):
            sums = sums + (gl.zeros([_CHUNK, TILE_ROWS], gl.float32, layout=SUMS),)
        for block in range(begin, end):
            stage = wait_filled(full, count)
            x_tile = x_shared.index(stage).permute((1, 0))
            started = ()  # type: tuple
            for index in gl.static_range(PANELS):
                w_tile = w_shared.index(stage * TILE_PANELS + GROUP * PANELS + index)
                started = started + (warpgroup_mma(w_tile, x_tile, sums[index], is_async=True),)
            # The products before are done, and with them their stage.
            sums = wait_for_products(PANELS, started)
            release(empty, (count + STAGES - 1) % STAGES, block > begin)
            count += 1
        sums = wait_for_products(0, sums)
        release(empty, (count + STAGES - 1) % STAGES, end > begin)
        if UPDATES:
            slots = gl.arange(0, SLOTS[2], layout=gl.BlockedLayout([1], [32], [4], [0]))
            if gl.max(gl.load(has_gains + slots, mask=slots < SLOTS[0], other=0), axis=0) != 0:
                grown = ()  # type: tuple
                for index in gl.static_range(PANELS):
                    panel = locate_panel(output_tile, GROUP * PANELS + index, num_outputs, TILE_PANELS, SILU)
                    part = _part(panel * _CHUNK, parts)
                    gain = _gain(
                        gains, has_gains, weights + part * stride_weights_part, tile_slots, ranks, panel * _CHUNK,
                        num_rows, layer_outputs, num_slots, stride_weights_row, TILE_ROWS, SUMS,
                    )  # fmt: skip
                    grown = grown + (sums[index] + sums[index] * gain,)
                sums = grown
            COLUMNS: gl.constexpr = (SLOTS[0] * SLOTS[1] + READ_COLUMNS - 1) // READ_COLUMNS
            used = _used_columns(tile_slots, ranks, SLOTS[0], SLOTS[1], SLOTS[2], 4)
            for number in range(split, COLUMNS * parts[3], splits):
                if ((used >> (number % COLUMNS)) & 1) != 0:
                    for half in gl.static_range(HALVES):
                        stage = wait_filled(full, count)
                        x_tile = x_shared.index(stage).permute((1, 0))
                        added = ()  # type: tuple
                        for index in gl.static_range(PANELS):
                            if index % HALVES == half:
                                w_tile = w_shared.index(stage * TILE_PANELS + GROUP * PANELS + index)
                                added = added + (warpgroup_mma(w_tile, x_tile, sums[index], is_async=True),)
                            else:
                                added = added + (sums[index],)
                        sums = wait_for_products(0, added)
                        release(empty, stage)
                        count += 1
        first_row = row_tile * TILE_ROWS
        target = out + split.to(gl.int64) * stride_split + first_row.to(gl.int64) * stride_out
        row_limit = num_rows - first_row
        for index in gl.static_range(0, PANELS, HALVES):
            first_output = locate_panel(output_tile, GROUP * PANELS + index, num_outputs, TILE_PANELS, SILU) * _CHUNK
            result = sums[index]
            if SILU:
                # Rounded in between as two kernels would round: the fusion does not change the result.
                gate = result.to(out.dtype.element_ty).to(gl.float32)
                up = sums[index + 1].to(out.dtype.element_ty).to(gl.float32)
                result = gate / (1.0 + gl.exp(-gate)) * up
            if HAS_BIAS:
                biased = first_output + gl.arange(0, _CHUNK, layout=gl.SliceLayout(1, SUMS))
                added_bias = gl.load(bias + biased, mask=biased < num_outputs, other=0.0)
                result += added_bias.to(gl.float32)[:, None]
            store_tile(target + first_output, result, row_limit, num_outputs - first_output, stride_out)


@gluon.jit(
    do_not_specialize=[
        "num_rows", "num_slots", "size0", "size1", "num_parts", "hidden_splits", "row_tiles", "output_tiles", "splits",
        "blocks", "stride_weights_part", "stride_weights_row",
    ]
)  # fmt: skip
def _hopper_matmul_kernel(
    x_rows,  # [num_rows, num_inputs], in boxes of [TILE_ROWS, 64]
    weight_rows,  # [num_outputs, num_inputs], twice the outputs with SILU, gate first; in boxes of [64, 64]
    bias,  # [num_outputs]; unused unless HAS_BIAS
    out,  # [num_rows, num_outputs]; [splits, num_rows, num_outputs] float32 with several splits
    b_rows,  # [layer_outputs, slots * ranks], in boxes of [64, 64]; this and what follows is unused unless UPDATES
    hidden_rows,  # [hidden_splits * num_parts * num_rows, slots * ranks], in boxes of [TILE_ROWS, 64]
    gains,  # [slots, layer_outputs] float32
    has_gains,  # [slots] int32
    weights,  # [parts, num_rows, slots] float32
    tile_slots,  # [1 + tiles, slots] int32
    ranks,  # [slots] int32
    num_rows,
    num_outputs,
    layer_outputs,
    num_slots,
    size0,  # of the layer's parts
    size1,
    num_parts,
    hidden_splits,
    row_tiles,
    output_tiles,
    splits,
    blocks,
    stride_out,
    stride_split,
    stride_weights_part,
    stride_weights_row,
    GROUPS: gl.constexpr,
    PANELS: gl.constexpr,
    STAGES: gl.constexpr,
    MULTIPLYING_REGISTERS: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SILU: gl.constexpr,
    PDL: gl.constexpr,
    UPDATES: gl.constexpr,
    SLOTS: gl.constexpr,  # their number, ranks of each, and their number padded to a power of two
):
    if PDL:
        gdc_launch_dependents()
    DTYPE: gl.constexpr = x_rows.dtype
    TILE_PANELS: gl.constexpr = GROUPS * PANELS
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    x_shared = gl.allocate_shared_memory(DTYPE, [STAGES, x_rows.block_shape[0], _CHUNK], x_rows.layout)
    w_shared = gl.allocate_shared_memory(DTYPE, [STAGES * TILE_PANELS, _CHUNK, _CHUNK], weight_rows.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for index in gl.static_range(STAGES):
        # Two warps fill a stage.
        mbarrier.init(full.index(index), count=2)
        mbarrier.init(empty.index(index), count=GROUPS)
    fence_async_shared()
    ring = (x_shared, w_shared, full, empty)
    work = (row_tiles, output_tiles, splits, blocks)
    parts = (size0, size1, num_parts, hidden_splits)
    sizes = (num_rows, num_outputs, layer_outputs, num_slots)
    strides = (stride_out, stride_split, stride_weights_part, stride_weights_row)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply_tiles, (
                    out, bias, gains, has_gains, weights, tile_slots, ranks, ring, work, parts, sizes, strides,
                    first, PANELS, TILE_PANELS, HAS_BIAS, SILU, UPDATES, SLOTS,
                )),
                (_load_weights, (
                    weight_rows, b_rows, tile_slots, ranks, ring, work, parts, num_outputs,
                    TILE_PANELS, SILU, UPDATES, SLOTS,
                )),
                (_load_x, (
                    x_rows, hidden_rows, tile_slots, ranks, ring, work, parts, num_rows, num_outputs,
                    TILE_PANELS, SILU, PDL, UPDATES, SLOTS,
                )),
            ],
            [1, 1],
            [LOADING_REGISTERS, LOADING_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply_tiles, (
                    out, bias, gains, has_gains, weights, tile_slots, ranks, ring, work, parts, sizes, strides,
                    first, PANELS, TILE_PANELS, HAS_BIAS, SILU, UPDATES, SLOTS,
                )),
                (_multiply_tiles, (
                    out, bias, gains, has_gains, weights, tile_slots, ranks, ring, work, parts, sizes, strides,
                    second, PANELS, TILE_PANELS, HAS_BIAS, SILU, UPDATES, SLOTS,
                )),
                (_load_weights, (
                    weight_rows, b_rows, tile_slots, ranks, ring, work, parts, num_outputs,
                    TILE_PANELS, SILU, UPDATES, SLOTS,
                )),
                (_load_x, (
                    x_rows, hidden_rows, tile_slots, ranks, ring, work, parts, num_rows, num_outputs,
                    TILE_PANELS, SILU, PDL, UPDATES, SLOTS,
                )),
            ],
            [4, 1, 1],
            [MULTIPLYING_REGISTERS, LOADING_REGISTERS, LOADING_REGISTERS],
        )  # fmt: skip


def matmul_hopper(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    silu_and_mul: bool = False,
    updates: Updates | None = None,
    num_processors: int,
    config: HopperProductConfig,
    pdl: bool = False,
) -> None:
    """``skinny_matmul`` for any number of rows that ``takes`` accepts, with arguments as there.

    num_processors: multiprocessors of the device. silu_and_mul wants outputs in whole panels of 64, updates all rows
    in one tile and ``shrink`` with ``fill``.
    """
    num_rows, num_inputs = x.shape
    num_outputs = out.shape[-1]
    check_dtype("x", x, HALF_DTYPES)
    check_shape("weight", weight, ((2 if silu_and_mul else 1) * num_outputs, num_inputs))
    check_product(out, num_rows, num_splits=config.num_splits, has_bias=bias is not None, silu_and_mul=silu_and_mul)
    check_last_contiguous("out", out)
    if not takes(x, weight, silu_and_mul=silu_and_mul):
        raise ValueError(f"x is {x.dtype} with strides {x.stride()}, weight {weight.dtype} with {weight.stride()}")
    if silu_and_mul and config.panels % 2:
        raise ValueError(f"silu_and_mul takes pairs of panels, not {config.panels}")
    row_tiles = triton.cdiv(num_rows, config.tile_rows)
    if updates is not None and row_tiles > 1:
        raise ValueError(f"updates take up to {config.tile_rows} rows here, not {num_rows}")
    tile_outputs = config.tile_outputs // (2 if silu_and_mul else 1)
    output_tiles = triton.cdiv(num_outputs, tile_outputs)
    blocks = triton.cdiv(num_inputs, _CHUNK.value)
    _hopper_matmul_kernel[(min(row_tiles * output_tiles * config.num_splits, num_processors),)](
        _boxes(x, config.tile_rows), _boxes(weight, _CHUNK.value), bias, out,
        num_rows=num_rows, num_outputs=num_outputs, row_tiles=row_tiles, output_tiles=output_tiles,
        splits=config.num_splits, blocks=blocks, stride_out=out.stride(-2),
        stride_split=out.stride(0) if config.num_splits > 1 else 0, GROUPS=config.groups, PANELS=config.panels,
        STAGES=config.num_stages, MULTIPLYING_REGISTERS=_MULTIPLYING_REGISTERS, LOADING_REGISTERS=_LOADING_REGISTERS,
        HAS_BIAS=bias is not None, SILU=silu_and_mul, PDL=pdl, num_warps=4, maxnreg=_REGISTERS[config.groups],
        **_update_arguments(updates, x, config, tile_outputs), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _boxes(rows: Tensor, box_rows: int) -> TensorDescriptor:
    return TensorDescriptor(rows, list(rows.shape), [rows.stride(0), 1], [box_rows, _CHUNK.value], _LAYOUT)


def _update_arguments(
    updates: Updates | None, x: Tensor, config: HopperProductConfig, tile_outputs: int
) -> dict[str, Any]:
    """Those of the kernel by name."""
    if updates is None:
        tensors = ("b_rows", "hidden_rows", "gains", "has_gains", "weights", "tile_slots", "ranks")
        sizes = ("layer_outputs", "num_slots", "size0", "size1", "num_parts", "hidden_splits", "stride_weights_part",
                 "stride_weights_row")  # fmt: skip
        return {
            **dict.fromkeys(tensors), **dict.fromkeys(sizes, 0), "UPDATES": False, "SLOTS": (0, 0, 1),
        }  # fmt: skip
    given = update_arguments(updates, x.shape[0], tile_outputs, x.dtype)
    columns = given["NUM_SLOTS"] * given["MAX_RANK"]
    taken = ("gains", "has_gains", "weights", "tile_slots", "ranks", "layer_outputs", "stride_weights_part",
             "stride_weights_row", "UPDATES")  # fmt: skip
    return {
        **{name: given[name] for name in taken},
        "num_slots": given["NUM_SLOTS"],
        "b_rows": _boxes(updates.layer.b.transpose(0, 1).view(-1, columns), _CHUNK.value),
        "hidden_rows": _boxes(updates.hidden.view(-1, columns), config.tile_rows),
        "SLOTS": (given["NUM_SLOTS"], given["MAX_RANK"], given["PADDED_SLOTS"]),
        "size0": given["SIZE0"],
        "size1": given["SIZE1"],
        "num_parts": given["NUM_PARTS"],
        "hidden_splits": given["HIDDEN_SPLITS"],
    }
