"""Low-rank updates of linear layers: shrink to the rank, then expand to the outputs, for all slots of a step at once.

Two launches a layer, whatever the mix of adapters. Which slots a tile of rows needs, how large their ranks are and how
much of them each row takes is read on the device, so the launches can be captured into a CUDA graph; programs of slots
and ranks that nobody uses end at once. Knows nothing of where adapters come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape
from .lora_layer import TILE_ROWS, LoraLayer, LoraRows

MAX_PARTS = 3
_TILE_RANKS = 16
"""Ranks of a program: the matrix instructions' least."""


@dataclass(frozen=True)
class LoraConfig:
    tile_inputs: int
    """Columns of x per step of shrink."""
    inputs_per_split: int
    """Columns of x per program of shrink; expand adds the programs' sums up."""
    tile_outputs: int
    """Outputs per program of expand."""


def default_config(num_inputs: int) -> LoraConfig:
    """At most four sums to add up, each of a few steps, so that few slots still occupy many multiprocessors."""
    share = triton.next_power_of_2(triton.cdiv(num_inputs, 4))
    return LoraConfig(tile_inputs=min(256, share), inputs_per_split=share, tile_outputs=128)


@triton.jit
def _shrink_kernel(
    x,  # [num_rows, num_inputs]
    a,  # [S, NUM_PARTS, max_rank, num_inputs]
    ranks,  # [S] int32
    weights,  # [parts, num_rows, S] float32, parts NUM_PARTS or 1 with stride 0
    tile_slots,  # [tiles, S] int32
    hidden,  # [NUM_SPLITS, tiles, S, NUM_PARTS, max_rank, TILE_ROWS] float32
    num_rows,
    num_inputs,
    max_rank,
    num_slots,
    num_tiles,
    stride_x,
    stride_weights_part,
    stride_weights_row,
    NUM_PARTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile, split = tl.program_id(0), tl.program_id(2)
    rank_tiles = (max_rank + TILE_RANKS - 1) // TILE_RANKS
    rank_tile = tl.program_id(1) % rank_tiles
    part = tl.program_id(1) // rank_tiles % NUM_PARTS
    entry = tl.program_id(1) // (rank_tiles * NUM_PARTS)
    slot = tl.load(tile_slots + tile * num_slots + entry)
    if slot < 0:
        return
    rank = tl.load(ranks + slot)
    if rank_tile * TILE_RANKS >= rank:
        return
    rows = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    wanted = rank_tile * TILE_RANKS + tl.arange(0, TILE_RANKS)
    columns = split * SPLIT_INPUTS + tl.arange(0, TILE_INPUTS)
    x_pointers = x + rows.to(tl.int64)[:, None] * stride_x
    first_a = (slot.to(tl.int64) * NUM_PARTS + part) * max_rank
    a_pointers = a + (first_a + wanted)[:, None] * num_inputs
    acc = tl.zeros([TILE_RANKS, TILE_ROWS], tl.float32)
    for first in range(0, SPLIT_INPUTS, TILE_INPUTS):
        inside = (first + columns < num_inputs)[None, :]
        a_tile = tl.load(a_pointers + (first + columns)[None, :], mask=(wanted < rank)[:, None] & inside, other=0.0)
        x_tile = tl.load(x_pointers + (first + columns)[None, :], mask=(rows < num_rows)[:, None] & inside, other=0.0)
        acc = tl.dot(a_tile, tl.trans(x_tile), acc, input_precision="ieee")
    weight_pointers = weights + part * stride_weights_part + rows * stride_weights_row + slot
    acc *= tl.load(weight_pointers, mask=rows < num_rows, other=0.0)[None, :]
    place = ((split * num_tiles + tile) * num_slots + entry).to(tl.int64) * NUM_PARTS + part
    out = hidden + (place * max_rank + wanted[:, None]) * TILE_ROWS + tl.arange(0, TILE_ROWS)[None, :]
    tl.store(out, acc, mask=(wanted < rank)[:, None])


@triton.jit
def _expand_kernel(
    y,  # [num_rows, num_outputs]
    bias,  # [num_outputs]; unused unless HAS_BIAS
    b,  # [S, num_outputs, max_rank]
    gains,  # [S, num_outputs] float32
    ranks,  # [S] int32
    has_gains,  # [S] int32
    weights,  # [parts, num_rows, S] float32, parts NUM_PARTS or 1 with stride 0
    tile_slots,  # [tiles, S] int32
    hidden,  # [NUM_SPLITS, tiles, S, NUM_PARTS, max_rank, TILE_ROWS] float32
    num_rows,
    num_outputs,
    max_rank,
    num_slots,
    num_tiles,
    stride_y,
    stride_weights_part,
    stride_weights_row,
    SIZE0: tl.constexpr,
    SIZE1: tl.constexpr,
    SIZE2: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile, output_tile = tl.program_id(0), tl.program_id(1)
    slot = tl.load(tile_slots + tile * num_slots)
    if slot < 0:
        return
    # No tile of outputs reaches into two parts.
    TILES0: tl.constexpr = (SIZE0 + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    TILES1: tl.constexpr = (SIZE1 + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    part = (output_tile >= TILES0).to(tl.int32) + (output_tile >= TILES0 + TILES1).to(tl.int32)
    begin = tl.where(part == 0, 0, tl.where(part == 1, SIZE0, SIZE0 + SIZE1))
    end = tl.where(part == 0, SIZE0, tl.where(part == 1, SIZE0 + SIZE1, SIZE0 + SIZE1 + SIZE2))
    tile_in_part = output_tile - tl.where(part == 0, 0, tl.where(part == 1, TILES0, TILES0 + TILES1))
    outputs = begin + tile_in_part * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    in_range = outputs < end
    rows = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    y_pointers = y + rows.to(tl.int64)[None, :] * stride_y + outputs[:, None]
    y_mask = in_range[:, None] & (rows < num_rows)[None, :]
    before = tl.load(y_pointers, mask=y_mask, other=0.0).to(tl.float32)
    product = before
    if HAS_BIAS:
        product = before - tl.load(bias + outputs, mask=in_range, other=0.0).to(tl.float32)[:, None]
    acc = tl.zeros([TILE_OUTPUTS, TILE_ROWS], tl.float32)
    entry = 0
    while slot >= 0:
        rank = tl.load(ranks + slot)
        b_pointers = b + (slot.to(tl.int64) * num_outputs + outputs)[:, None] * max_rank
        for first in range(0, rank, TILE_RANKS):
            wanted = first + tl.arange(0, TILE_RANKS)
            values = tl.zeros([TILE_RANKS, TILE_ROWS], tl.float32)
            for split in tl.static_range(NUM_SPLITS):
                place = ((split * num_tiles + tile) * num_slots + entry).to(tl.int64) * NUM_PARTS + part
                source = hidden + (place * max_rank + wanted[:, None]) * TILE_ROWS + tl.arange(0, TILE_ROWS)[None, :]
                values += tl.load(source, mask=(wanted < rank)[:, None], other=0.0)
            b_tile = tl.load(
                b_pointers + wanted[None, :], mask=in_range[:, None] & (wanted < rank)[None, :], other=0.0
            )
            acc = tl.dot(b_tile, values.to(b_tile.dtype), acc, input_precision="ieee")
        if tl.load(has_gains + slot) != 0:
            gain = tl.load(gains + slot.to(tl.int64) * num_outputs + outputs, mask=in_range, other=0.0)
            weight_pointers = weights + part * stride_weights_part + rows * stride_weights_row + slot
            weight = tl.load(weight_pointers, mask=rows < num_rows, other=0.0)
            acc += product * gain[:, None] * weight[None, :]
        entry += 1
        slot = tl.load(tile_slots + tile * num_slots + entry, mask=entry < num_slots, other=-1)
    tl.store(y_pointers, (before + acc).to(y.dtype.element_ty), mask=y_mask)


def add_lora(
    y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    layer: LoraLayer,
    rows: LoraRows,
    *,
    config: LoraConfig | None = None,
    pdl: bool = False,
) -> None:
    """Add to y [T, out], which is W x + bias, the updates that ``rows`` take of ``layer``, in place; x is [T, in].

    Equal dtypes of x, y and the layer; sums in float32.
    """
    num_rows, num_inputs = x.shape
    num_slots, num_parts, max_rank, _ = layer.a.shape
    num_outputs = y.shape[1]
    config = config or default_config(num_inputs)
    check_dtype("x", x, FLOAT_DTYPES)
    for name, tensor in (("y", y), ("a", layer.a), ("b", layer.b)):
        check_dtype(name, tensor, (x.dtype,))
    check_shape("a", layer.a, (num_slots, num_parts, max_rank, num_inputs))
    check_shape("b", layer.b, (num_slots, num_outputs, max_rank))
    check_shape("y", y, (num_rows, num_outputs))
    num_tiles = triton.cdiv(num_rows, TILE_ROWS)
    check_shape("tile_slots", rows.tile_slots, (num_tiles, num_slots))
    check_shape("weights", rows.weights, (rows.weights.shape[0], num_rows, num_slots))
    for name, tensor in (("x", x), ("y", y), ("weights", rows.weights)):
        check_last_contiguous(name, tensor)
    if not num_rows:
        return
    num_splits = triton.cdiv(num_inputs, config.inputs_per_split)
    hidden = torch.empty(
        num_splits, num_tiles, num_slots, num_parts, max_rank, TILE_ROWS, dtype=torch.float32, device=x.device
    )
    shared = rows.weights.shape[0] == 1
    weights = rows.part_weights(layer.first_target)
    strides = (0 if shared else rows.weights.stride(0), weights.stride(0))
    launch = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    rank_tiles = triton.cdiv(max_rank, _TILE_RANKS)
    _shrink_kernel[(num_tiles, num_slots * num_parts * rank_tiles, num_splits)](
        x, layer.a, layer.ranks, weights, rows.tile_slots, hidden, num_rows, num_inputs, max_rank, num_slots,
        num_tiles, x.stride(0), *strides, NUM_PARTS=num_parts, TILE_ROWS=TILE_ROWS, TILE_RANKS=_TILE_RANKS,
        TILE_INPUTS=config.tile_inputs, SPLIT_INPUTS=config.inputs_per_split, num_warps=4, **launch,
    )  # fmt: skip
    sizes = (*layer.part_sizes, 0, 0)[:MAX_PARTS]
    output_tiles = sum(triton.cdiv(size, config.tile_outputs) for size in sizes)
    _expand_kernel[(num_tiles, output_tiles)](
        y, bias, layer.b, layer.gains, layer.ranks, layer.has_gains, weights, rows.tile_slots, hidden, num_rows,
        num_outputs, max_rank, num_slots, num_tiles, y.stride(0), *strides, SIZE0=sizes[0], SIZE1=sizes[1],
        SIZE2=sizes[2], NUM_PARTS=num_parts, NUM_SPLITS=num_splits, TILE_ROWS=TILE_ROWS, TILE_RANKS=_TILE_RANKS,
        TILE_OUTPUTS=config.tile_outputs, HAS_BIAS=bias is not None, num_warps=4, **launch,
    )  # fmt: skip
