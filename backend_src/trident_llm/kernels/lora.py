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
_SHARES = 8
"""Warps of shrink, each with columns of its own."""
_SHARE_INPUTS = 128
"""Columns of a warp in one step."""


@dataclass(frozen=True)
class LoraConfig:
    inputs_per_split: int
    """Columns of x per program of shrink; expand adds the programs' sums up. A multiple of a step's columns."""
    tile_outputs: int
    """Outputs per program of expand."""
    tile_entries: int
    """Slots of a tile of rows that expand takes at once; a power of 2."""


def default_config(num_inputs: int) -> LoraConfig:
    """Few splits: they cost expand, which has far more programs, additions."""
    return LoraConfig(inputs_per_split=2048 if num_inputs <= 4096 else 4096, tile_outputs=128, tile_entries=4)


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
    inputs_per_split,
    stride_x,
    stride_weights_part,
    stride_weights_row,
    NUM_PARTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    SHARES: tl.constexpr,
    SHARE_INPUTS: tl.constexpr,
    PADDED_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    tile, split = tl.program_id(0), tl.program_id(2)
    rank_tiles = (max_rank + TILE_RANKS - 1) // TILE_RANKS
    rank_tile = tl.program_id(1) % rank_tiles
    part = tl.program_id(1) // rank_tiles % NUM_PARTS
    entry = tl.program_id(1) // (rank_tiles * NUM_PARTS)
    # Slots, ranks and matrices are older than the step: only x and the weights are waited for.
    slot = tl.load(tile_slots + tile * num_slots + entry)
    all_slots = tl.arange(0, PADDED_SLOTS)
    all_ranks = tl.load(ranks + all_slots, mask=all_slots < num_slots, other=0)
    rank = tl.sum(tl.where(all_slots == slot, all_ranks, 0), axis=0)
    if rank_tile * TILE_RANKS >= rank:
        if PDL:
            gdc_wait()
        return
    rows = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    wanted = rank_tile * TILE_RANKS + tl.arange(0, TILE_RANKS)
    # Each share of a step's columns is the business of one warp.
    columns = tl.arange(0, SHARES)[:, None] * SHARE_INPUTS + tl.arange(0, SHARE_INPUTS)[None, :]
    columns += split * inputs_per_split
    end = tl.minimum((split + 1) * inputs_per_split, num_inputs)
    first_a = (slot.to(tl.int64) * NUM_PARTS + part) * max_rank
    a_pointers = a + (first_a + wanted)[None, :, None] * num_inputs + columns[:, None, :]
    x_pointers = x + rows.to(tl.int64)[None, None, :] * stride_x + columns[:, :, None]
    a_inside = (wanted < rank)[None, :, None]
    x_inside = (rows < num_rows)[None, None, :]
    a_next = tl.load(a_pointers, mask=a_inside & (columns < end)[:, None, :], other=0.0)
    if PDL:
        gdc_wait()
    x_next = tl.load(x_pointers, mask=x_inside & (columns < end)[:, :, None], other=0.0)
    weight_pointers = weights + part * stride_weights_part + rows * stride_weights_row + slot
    weight = tl.load(weight_pointers, mask=rows < num_rows, other=0.0)
    acc = tl.zeros([SHARES, TILE_RANKS, TILE_ROWS], tl.float32)
    for _ in range(0, inputs_per_split, SHARES * SHARE_INPUTS):
        a_tile, x_tile = a_next, x_next
        columns += SHARES * SHARE_INPUTS
        a_pointers += SHARES * SHARE_INPUTS
        x_pointers += SHARES * SHARE_INPUTS
        # On their way while this step's product is computed.
        a_next = tl.load(a_pointers, mask=a_inside & (columns < end)[:, None, :], other=0.0)
        x_next = tl.load(x_pointers, mask=x_inside & (columns < end)[:, :, None], other=0.0)
        acc = tl.dot(a_tile, x_tile, acc, input_precision="ieee")
    place = ((split * num_tiles + tile) * num_slots + entry).to(tl.int64) * NUM_PARTS + part
    out = hidden + (place * max_rank + wanted[:, None]) * TILE_ROWS + tl.arange(0, TILE_ROWS)[None, :]
    tl.store(out, tl.sum(acc, axis=0) * weight[None, :], mask=(wanted < rank)[:, None])


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
    TILE_ENTRIES: tl.constexpr,
    PADDED_SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    tile, output_tile = tl.program_id(0), tl.program_id(1)
    entries = tl.arange(0, PADDED_SLOTS)
    all_ranks = tl.load(ranks + entries, mask=entries < num_slots, other=0)
    all_gained = tl.load(has_gains + entries, mask=entries < num_slots, other=0)
    own = tl.load(tile_slots + tile * num_slots + entries, mask=entries < num_slots, other=-1)
    own_ranks = tl.where(own < 0, 0, tl.gather(all_ranks, tl.maximum(own, 0), 0))
    most = tl.max(own_ranks, axis=0)
    if most == 0:
        if PDL:
            gdc_wait()
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
    # The inner dimension of a product: TILE_RANKS ranks of one slot, then those of the next. Products go over the
    # slots first, then over the ranks. Those of B are older than the step, and the first needs no wait.
    inner = tl.arange(0, TILE_ENTRIES * TILE_RANKS)
    groups = tl.cdiv(tl.sum((own >= 0).to(tl.int32), axis=0), TILE_ENTRIES)
    entry = inner // TILE_RANKS
    wanted = inner % TILE_RANKS
    slots = tl.gather(own, entry, 0)
    is_there = (slots >= 0) & (wanted < tl.gather(own_ranks, entry, 0))
    b_pointers = b + (slots.to(tl.int64)[None, :] * num_outputs + outputs[:, None]) * max_rank + wanted[None, :]
    b_next = tl.load(b_pointers, mask=in_range[:, None] & is_there[None, :], other=0.0)
    if PDL:
        gdc_wait()
    y_pointers = y + rows.to(tl.int64)[None, :] * stride_y + outputs[:, None]
    y_mask = in_range[:, None] & (rows < num_rows)[None, :]
    before = tl.load(y_pointers, mask=y_mask, other=0.0).to(tl.float32)
    acc = tl.zeros([TILE_OUTPUTS, TILE_ROWS], tl.float32)
    num_products = groups * tl.cdiv(most, TILE_RANKS)
    for number in range(0, num_products):
        b_tile = b_next
        values = tl.zeros([TILE_ENTRIES * TILE_RANKS, TILE_ROWS], tl.float32)
        for split in tl.static_range(NUM_SPLITS):
            place = ((split * num_tiles + tile) * num_slots + entry).to(tl.int64) * NUM_PARTS + part
            source = hidden + (place * max_rank + wanted)[:, None] * TILE_ROWS + tl.arange(0, TILE_ROWS)[None, :]
            values += tl.load(source, mask=is_there[:, None], other=0.0)
        entry = (number + 1) % groups * TILE_ENTRIES + inner // TILE_RANKS
        wanted = (number + 1) // groups * TILE_RANKS + inner % TILE_RANKS
        slots = tl.gather(own, entry, 0)
        is_there = (slots >= 0) & (wanted < tl.gather(own_ranks, entry, 0))
        b_pointers = b + (slots.to(tl.int64)[None, :] * num_outputs + outputs[:, None]) * max_rank + wanted[None, :]
        b_next = tl.load(b_pointers, mask=in_range[:, None] & is_there[None, :], other=0.0)
        acc = tl.dot(b_tile, values.to(b_tile.dtype), acc, input_precision="ieee")
    own_gained = tl.where(own < 0, 0, tl.gather(all_gained, tl.maximum(own, 0), 0))
    if tl.max(own_gained, axis=0) != 0:
        product = before
        if HAS_BIAS:
            product = before - tl.load(bias + outputs, mask=in_range, other=0.0).to(tl.float32)[:, None]
        for index in range(0, tl.sum((own >= 0).to(tl.int32), axis=0)):
            slot = tl.load(tile_slots + tile * num_slots + index)
            is_gained = tl.load(has_gains + slot) != 0
            gain_pointers = gains + slot.to(tl.int64) * num_outputs + outputs
            gain = tl.load(gain_pointers, mask=in_range & is_gained, other=0.0)
            weight_pointers = weights + part * stride_weights_part + rows * stride_weights_row + slot
            weight = tl.load(weight_pointers, mask=(rows < num_rows) & is_gained, other=0.0)
            acc += product * gain[:, None] * weight[None, :]
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
    hidden = shrink(x, layer, rows, config=config, pdl=pdl)
    expand(y, bias, hidden, layer, rows, config=config, pdl=pdl)


def shrink(
    x: Tensor, layer: LoraLayer, rows: LoraRows, *, config: LoraConfig | None = None, pdl: bool = False
) -> Tensor:
    """What ``expand`` reads: A x times the rows' weights, in parts to be added up, by tile of rows and slot."""
    num_rows, num_inputs = x.shape
    num_slots, num_parts, max_rank, _ = layer.a.shape
    config = config or default_config(num_inputs)
    check_dtype("x", x, FLOAT_DTYPES)
    check_dtype("a", layer.a, (x.dtype,))
    check_shape("a", layer.a, (num_slots, num_parts, max_rank, num_inputs))
    check_last_contiguous("x", x)
    num_tiles, weights, strides = _checked_rows(layer, rows, num_rows)
    num_splits = triton.cdiv(num_inputs, config.inputs_per_split)
    hidden = torch.empty(
        num_splits, num_tiles, num_slots, num_parts, max_rank, TILE_ROWS, dtype=torch.float32, device=x.device
    )
    if num_rows:
        rank_tiles = triton.cdiv(max_rank, _TILE_RANKS)
        _shrink_kernel[(num_tiles, num_slots * num_parts * rank_tiles, num_splits)](
            x, layer.a, layer.ranks, weights, rows.tile_slots, hidden, num_rows, num_inputs, max_rank, num_slots,
            num_tiles, config.inputs_per_split, x.stride(0), *strides, NUM_PARTS=num_parts, TILE_ROWS=TILE_ROWS,
            TILE_RANKS=_TILE_RANKS, SHARES=_SHARES, SHARE_INPUTS=_SHARE_INPUTS,
            PADDED_SLOTS=triton.next_power_of_2(num_slots), PDL=pdl, num_warps=_SHARES,
            **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return hidden


def expand(
    y: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    layer: LoraLayer,
    rows: LoraRows,
    *,
    config: LoraConfig | None = None,
    pdl: bool = False,
) -> None:
    """The rest of ``add_lora``, with the same ``config``."""
    num_rows, num_outputs = y.shape
    num_slots, num_parts, max_rank, num_inputs = layer.a.shape
    config = config or default_config(num_inputs)
    for name, tensor in (("y", y), ("b", layer.b)):
        check_dtype(name, tensor, (layer.a.dtype,))
    check_shape("b", layer.b, (num_slots, num_outputs, max_rank))
    check_shape("y", y, (num_rows, sum(layer.part_sizes)))
    check_last_contiguous("y", y)
    num_tiles, weights, strides = _checked_rows(layer, rows, num_rows)
    num_splits = triton.cdiv(num_inputs, config.inputs_per_split)
    check_shape("hidden", hidden, (num_splits, num_tiles, num_slots, num_parts, max_rank, TILE_ROWS))
    if not num_rows:
        return
    sizes = (*layer.part_sizes, 0, 0)[:MAX_PARTS]
    output_tiles = sum(triton.cdiv(size, config.tile_outputs) for size in sizes)
    _expand_kernel[(num_tiles, output_tiles)](
        y, bias, layer.b, layer.gains, layer.ranks, layer.has_gains, weights, rows.tile_slots, hidden, num_rows,
        num_outputs, max_rank, num_slots, num_tiles, y.stride(0), *strides, SIZE0=sizes[0], SIZE1=sizes[1],
        SIZE2=sizes[2], NUM_PARTS=num_parts, NUM_SPLITS=num_splits, TILE_ROWS=TILE_ROWS, TILE_RANKS=_TILE_RANKS,
        TILE_OUTPUTS=config.tile_outputs, TILE_ENTRIES=config.tile_entries,
        PADDED_SLOTS=max(triton.next_power_of_2(num_slots), config.tile_entries), HAS_BIAS=bias is not None,
        PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _checked_rows(layer: LoraLayer, rows: LoraRows, num_rows: int) -> tuple[int, Tensor, tuple[int, int]]:
    """Tiles, the weights of the layer's first part, and the strides of weights from part to part and row to row."""
    num_tiles, num_slots = triton.cdiv(num_rows, TILE_ROWS), layer.a.shape[0]
    check_shape("tile_slots", rows.tile_slots, (num_tiles, num_slots))
    check_shape("weights", rows.weights, (rows.weights.shape[0], num_rows, num_slots))
    check_last_contiguous("weights", rows.weights)
    weights = rows.part_weights(layer.first_target)
    return num_tiles, weights, (0 if rows.weights.shape[0] == 1 else rows.weights.stride(0), weights.stride(0))
