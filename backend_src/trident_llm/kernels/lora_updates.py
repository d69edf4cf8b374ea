"""The second half of low-rank updates inside the product that they are added to: more columns of one sum.

The kernel that multiplies has the sums of W x in registers; what a step takes of B A x joins them there, so there is
neither a second launch nor another pass over the outputs. Made for the few rows of ``skinny_matmul``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_dtype, check_last_contiguous, check_shape
from .lora import MAX_PARTS, checked_rows
from .lora_layer import LoraLayer, LoraRows

_TILE_INNER = 64
"""Columns of one product: ranks of one slot, then of the next. Half as many where more rows leave fewer registers."""
_GROUP_RANKS: tl.constexpr = tl.constexpr(16)
"""Ranks that are read or not together."""
_MAX_GROUPS = 63
"""Bits of an int64 but its sign."""


@dataclass(frozen=True)
class Updates:
    """What rows take of a layer; ``hidden`` is what ``shrink`` has made, or is still making, of their x."""

    layer: LoraLayer
    rows: LoraRows
    hidden: Tensor


def takes_updates(layer: LoraLayer, tile_outputs: int) -> bool:
    """Whether no tile of outputs would reach into two of the layer's parts, and ranks and slots are not too many."""
    num_groups = len(layer.ranks) * triton.cdiv(layer.b.shape[2], _GROUP_RANKS.value)
    return num_groups <= _MAX_GROUPS and all(size % tile_outputs == 0 for size in layer.part_sizes)


@triton.jit
def used_ranks(
    tile_slots,  # [1 + tiles, S] int32
    ranks,  # [S] int32
    num_slots,
    MAX_RANK: tl.constexpr,
    PADDED_SLOTS: tl.constexpr,
):
    """What is read of the columns of all slots: an int64 with a bit for each group of ranks of a slot that any row
    takes, and the first slot from which on nobody takes any."""
    GROUPS: tl.constexpr = (MAX_RANK + _GROUP_RANKS - 1) // _GROUP_RANKS
    slots = tl.arange(0, PADDED_SLOTS)
    own = tl.load(tile_slots + slots, mask=slots < num_slots, other=-1)
    groups = tl.cdiv(tl.load(ranks + slots, mask=own >= 0, other=0), _GROUP_RANKS).to(tl.int64)
    one = tl.full([PADDED_SLOTS], 1, tl.int64)
    return tl.sum(((one << groups) - 1) << (slots * GROUPS).to(tl.int64), axis=0), tl.max(own, axis=0) + 1


@triton.jit
def add_updates(
    acc,  # [TILE_OUTPUTS, PADDED_ROWS] float32: W x, or a part of its sums
    used,  # this and end_slot: see used_ranks
    end_slot,
    b,  # [num_outputs, S, MAX_RANK]
    gains,  # [S, num_outputs] float32
    has_gains,  # [S] int32
    weights,  # [parts, num_rows, S] float32
    hidden,  # [HIDDEN_SPLITS, NUM_PARTS, num_rows, S, MAX_RANK]
    first_output,  # of the layer's outputs
    adds,  # whether the low-rank part is added; gains are anyway
    num_rows,
    num_outputs,
    stride_weights_part,
    stride_weights_row,
    SIZE0: tl.constexpr,
    SIZE1: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    HIDDEN_SPLITS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    PADDED_SLOTS: tl.constexpr,
    TILE_INNER: tl.constexpr,
):
    """acc with what the rows take of the updates.

    All slots' ranks are columns of one sum, and so are the splits of ``hidden``; what nobody takes is not read.
    """
    GROUPS: tl.constexpr = (MAX_RANK + _GROUP_RANKS - 1) // _GROUP_RANKS
    COLUMNS: tl.constexpr = NUM_SLOTS * MAX_RANK
    part = (first_output >= SIZE0).to(tl.int32) + (first_output >= SIZE0 + SIZE1).to(tl.int32)
    outputs = first_output + tl.arange(0, TILE_OUTPUTS)
    rows = tl.arange(0, PADDED_ROWS)
    has_row = rows < num_rows
    slots = tl.arange(0, PADDED_SLOTS)
    takes_slot = (used >> (slots * GROUPS).to(tl.int64)) & 1
    gained = tl.load(has_gains + slots, mask=slots < NUM_SLOTS, other=0) * takes_slot
    if tl.max(gained, axis=0) != 0:
        gain = tl.zeros([TILE_OUTPUTS, PADDED_ROWS], tl.float32)
        for slot in range(0, NUM_SLOTS):
            is_gained = (tl.load(has_gains + slot) != 0) & (((used >> (slot * GROUPS)) & 1) != 0)
            of_slot = tl.load(gains + tl.cast(slot, tl.int64) * num_outputs + outputs, mask=is_gained, other=0.0)
            row_weights = weights + part * stride_weights_part + rows * stride_weights_row + slot
            weight = tl.load(row_weights, mask=has_row & is_gained, other=0.0)
            gain += of_slot[:, None] * weight[None, :]
        acc += acc * gain
    inner = tl.arange(0, TILE_INNER)
    b_pointers = b + outputs.to(tl.int64)[:, None] * COLUMNS + inner[None, :]
    hidden_pointers = hidden + (part * num_rows + rows).to(tl.int64)[:, None] * COLUMNS + inner[None, :]
    stride_split = NUM_PARTS * num_rows * COLUMNS
    tiles = tl.cdiv(end_slot * MAX_RANK, TILE_INNER)
    for number in tl.range(0, tl.where(adds, tiles * HIDDEN_SPLITS, 0), num_stages=4):
        first = number % tiles * TILE_INNER
        column = first + inner
        # In a form in which the compiler sees that 16 columns are read together.
        if GROUPS == 1:
            group = column // MAX_RANK
        elif GROUPS * _GROUP_RANKS == MAX_RANK:
            group = column // _GROUP_RANKS
        else:
            group = column // MAX_RANK * GROUPS + column % MAX_RANK // _GROUP_RANKS
        takes = ((used >> group.to(tl.int64)) & 1) != 0
        if COLUMNS % TILE_INNER != 0:
            takes = takes & (column < COLUMNS)
        b_tile = tl.load(b_pointers + first, mask=takes[None, :], other=0.0)
        source = hidden_pointers + (number // tiles * stride_split + first)
        values = tl.load(source, mask=takes[None, :] & has_row[:, None], other=0.0)
        acc = tl.dot(b_tile, tl.trans(values), acc)
    return acc


def update_arguments(updates: Updates, num_rows: int, tile_outputs: int, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a kernel that calls these functions, by name. Raises for tensors that do not fit."""
    layer, hidden = updates.layer, updates.hidden
    num_slots, num_parts, max_rank, _ = layer.a.shape
    num_outputs = sum(layer.part_sizes)
    check_dtype("b", layer.b, (dtype,))
    check_shape("b", layer.b, (num_slots, num_outputs, max_rank))
    check_last_contiguous("b", layer.b.transpose(0, 1), 3)
    check_shape("hidden", hidden, (-1, num_parts, num_rows, num_slots, max_rank))
    check_dtype("hidden", hidden, (dtype,))
    if not takes_updates(layer, tile_outputs):
        raise ValueError(f"parts of {layer.part_sizes} outputs; allowed: multiples of {tile_outputs}")
    _, weights, strides = checked_rows(layer, updates.rows, num_rows)
    sizes = (*layer.part_sizes, 0, 0)[:MAX_PARTS]
    return {
        "b": layer.b, "gains": layer.gains, "ranks": layer.ranks, "has_gains": layer.has_gains, "weights": weights,
        "tile_slots": updates.rows.tile_slots, "hidden": hidden, "layer_outputs": num_outputs,
        "stride_weights_part": strides[0], "stride_weights_row": strides[1],
        "SIZE0": sizes[0], "SIZE1": sizes[1], "NUM_PARTS": num_parts, "NUM_SLOTS": num_slots, "MAX_RANK": max_rank,
        "HIDDEN_SPLITS": hidden.shape[0], "PADDED_SLOTS": triton.next_power_of_2(num_slots),
        "TILE_INNER": _TILE_INNER if num_rows <= 64 else _TILE_INNER // 2, "UPDATES": True,
    }  # fmt: skip


NO_UPDATES: dict[str, Any] = {
    **dict.fromkeys(("b", "gains", "ranks", "has_gains", "weights", "tile_slots", "hidden")),
    **dict.fromkeys(("layer_outputs", "stride_weights_part", "stride_weights_row"), 0),
    **dict.fromkeys(("SIZE0", "SIZE1", "NUM_PARTS", "NUM_SLOTS", "MAX_RANK", "HIDDEN_SPLITS"), 0),
    **dict.fromkeys(("PADDED_SLOTS", "TILE_INNER"), 0), "UPDATES": False,
}  # fmt: skip
"""The same where there are none."""
