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
READ_COLUMNS: tl.constexpr = tl.constexpr(64)
"""Of all slots' ranks: what a reader of ``shrink`` with fill reads together or not at all."""
_TILE_RANKS = 16
"""Ranks of a program: the matrix instructions' least."""
_FILLED_TILES = 8
"""Of rows: with so many or fewer the same kernel serves all."""
_SHARES = 8
"""Warps of shrink, each with columns of its own."""
_SHARE_BYTES = 256
"""Of each row of x, and of A, that a warp takes in one step."""


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


def joined_split(num_inputs: int, num_outputs: int) -> int:
    """Columns per program of shrink for ``lora_updates``, which has as many more columns as there are splits.

    Beside a product of few outputs shrink must be short. H200, 64 rows, 8 and 32 adapters, us of a product of 4,096 x
    4,096 with its norms: 25.7 and 29.5 with 2,048 columns a split, 28.2 and 30.0 with 4,096.
    """
    few_inputs = num_inputs <= 4096 and num_outputs <= 4096
    return 2048 if few_inputs else 4096


@triton.jit
def _is_read(
    tile_slots,  # [1 + tiles, S] int32
    ranks,  # [S] int32
    column,
    max_rank,
    num_slots,
    SIZE: tl.constexpr,
    PADDED_SLOTS: tl.constexpr,
):
    """Whether SIZE columns of all slots' ranks lie in a ``READ_COLUMNS`` of which any row takes one."""
    places = tl.arange(0, PADDED_SLOTS)
    own = tl.load(tile_slots + places, mask=places < num_slots, other=-1)
    rank = tl.load(ranks + places, mask=own >= 0, other=0)
    begin = places * max_rank // READ_COLUMNS
    last = (places * max_rank + rank - 1) // READ_COLUMNS
    near = (rank > 0) & (begin <= (column + SIZE - 1) // READ_COLUMNS) & (last >= column // READ_COLUMNS)
    return tl.max(near.to(tl.int32), axis=0) != 0


@triton.jit(do_not_specialize=["num_rows", "stride_weights_part", "stride_weights_row"])
def _shrink_kernel(
    x,  # [num_rows, num_inputs]
    a,  # [S, NUM_PARTS, max_rank, num_inputs]
    ranks,  # [S] int32
    weights,  # [parts, num_rows, S] float32, parts NUM_PARTS or 1 with stride 0
    tile_slots,  # [1 + tiles, S] int32
    hidden,  # [NUM_SPLITS, NUM_PARTS, num_rows, S, max_rank]
    num_rows,
    num_inputs,
    max_rank,
    num_slots,
    inputs_per_split,
    stride_x,
    stride_weights_part,
    stride_weights_row,
    NUM_PARTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    SHARES: tl.constexpr,
    SHARE_INPUTS: tl.constexpr,
    STEPS: tl.constexpr,
    PADDED_SLOTS: tl.constexpr,
    FILL: tl.constexpr,
    TILES: tl.constexpr,  # of rows, or more; 1 unless FILL
    PDL: tl.constexpr,
):
    tile, num_tiles, split = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    rank_tiles = (max_rank + TILE_RANKS - 1) // TILE_RANKS
    rank_tile = tl.program_id(1) % rank_tiles
    part = tl.program_id(1) // rank_tiles % NUM_PARTS
    slot = tl.program_id(1) // (rank_tiles * NUM_PARTS)
    # Slots, ranks and matrices are older than the step: only x and the weights are waited for.
    places = tl.arange(0, PADDED_SLOTS)
    rows = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    wanted = rank_tile * TILE_RANKS + tl.arange(0, TILE_RANKS)
    first_place = (split * NUM_PARTS + part) * num_rows
    row_places = (first_place + rows).to(tl.int64) * num_slots + slot
    out = hidden + row_places[None, :] * max_rank + wanted[:, None]
    out_mask = (wanted < max_rank)[:, None] & (rows < num_rows)[None, :]
    if FILL:
        column = slot * max_rank + rank_tile * TILE_RANKS
        if not _is_read(tile_slots, ranks, column, max_rank, num_slots, TILE_RANKS, PADDED_SLOTS):
            if PDL & (tile == 0) & (tl.program_id(1) == 0) & (split == 0):
                gdc_wait()
            return
        # Programs with nothing to multiply end at once, so that the others start. The first tile of rows that has
        # something fills the places of those that have not; where none has, the first of all does.
        tiles = tl.arange(0, TILES)
        all_own = tl.load(
            tile_slots + (tiles + 1)[:, None] * num_slots + places[None, :],
            mask=(tiles < num_tiles)[:, None] & (places < num_slots)[None, :], other=-1,
        )  # fmt: skip
        taken = tl.max((all_own == slot).to(tl.int32), axis=1) * (rank_tile * TILE_RANKS < tl.load(ranks + slot))
        all_rows = tiles[:, None] * TILE_ROWS + tl.arange(0, TILE_ROWS)[None, :]
        all_places = (first_place + all_rows).to(tl.int64) * num_slots + slot
        empty = hidden + all_places[None, :, :] * max_rank + wanted[:, None, None]
        empty_mask = (wanted < max_rank)[:, None, None] & ((taken == 0)[:, None] & (all_rows < num_rows))[None, :, :]
        nothing = tl.zeros([TILE_RANKS, TILES, TILE_ROWS], hidden.dtype.element_ty)
        first_tile = tl.min(tl.where(taken != 0, tiles, TILES), axis=0)
        rank = tl.load(ranks + slot) * tl.max(tl.where(tiles == tile, taken, 0), axis=0)
        if rank == 0:
            if (tile == 0) & (first_tile == TILES):
                if PDL:
                    gdc_wait()
                    gdc_launch_dependents()
                tl.store(empty, nothing, mask=empty_mask)
            return
    else:
        if tl.load(tile_slots + slot) < 0:
            # The kernel that follows begins when all programs have ended or allow it: one must know that x is there.
            if PDL & (tile == 0) & (tl.program_id(1) == 0) & (split == 0):
                gdc_wait()
            return
        own = tl.load(tile_slots + (tile + 1) * num_slots + places, mask=places < num_slots, other=-1)
        rank = tl.load(ranks + slot) * tl.max((own == slot).to(tl.int32), axis=0)
        if rank_tile * TILE_RANKS >= rank:
            if PDL:
                gdc_wait()
            tl.store(out, tl.zeros([TILE_RANKS, TILE_ROWS], hidden.dtype.element_ty), mask=out_mask)
            return
    # Each share of a step's columns is the business of one warp.
    columns = tl.arange(0, SHARES)[:, None] * SHARE_INPUTS + tl.arange(0, SHARE_INPUTS)[None, :]
    columns += split * inputs_per_split
    end = tl.minimum((split + 1) * inputs_per_split, num_inputs)
    first_a = (tl.cast(slot, tl.int64) * NUM_PARTS + part) * max_rank
    a_pointers = a + (first_a + wanted)[None, :, None] * num_inputs + columns[:, None, :]
    x_pointers = x + rows.to(tl.int64)[None, None, :] * stride_x + columns[:, :, None]
    a_inside = (wanted < rank)[None, :, None]
    x_inside = (rows < num_rows)[None, None, :]
    a_next = tl.load(a_pointers, mask=a_inside & (columns < end)[:, None, :], other=0.0)
    if PDL:
        gdc_wait()
        # Only now: the kernel that follows may read x before it waits for this one.
        gdc_launch_dependents()
    x_next = tl.load(x_pointers, mask=x_inside & (columns < end)[:, :, None], other=0.0)
    weight_pointers = weights + part * stride_weights_part + rows * stride_weights_row + slot
    weight = tl.load(weight_pointers, mask=rows < num_rows, other=0.0)
    acc = tl.zeros([SHARES, TILE_RANKS, TILE_ROWS], tl.float32)
    # The last step's product stands behind the loop, so that a single step keeps nothing else in registers.
    for _ in range(0, STEPS - 1):
        a_tile, x_tile = a_next, x_next
        columns += SHARES * SHARE_INPUTS
        a_pointers += SHARES * SHARE_INPUTS
        x_pointers += SHARES * SHARE_INPUTS
        # On their way while this step's product is computed.
        a_next = tl.load(a_pointers, mask=a_inside & (columns < end)[:, None, :], other=0.0)
        x_next = tl.load(x_pointers, mask=x_inside & (columns < end)[:, :, None], other=0.0)
        acc = tl.dot(a_tile, x_tile, acc, input_precision="ieee")
    acc = tl.dot(a_next, x_next, acc, input_precision="ieee")
    result = tl.sum(acc, axis=0) * weight[None, :]
    tl.store(out, tl.where((wanted < rank)[:, None], result, 0.0).to(hidden.dtype.element_ty), mask=out_mask)
    if FILL:  # noqa: SIM102 - the language evaluates both sides of an "and"
        if tile == first_tile:
            tl.store(empty, nothing, mask=empty_mask)


@triton.jit
def _expand_kernel(
    y,  # [num_rows, num_outputs]
    bias,  # [num_outputs]; unused unless HAS_BIAS
    b,  # [num_outputs, S, max_rank]
    gains,  # [S, num_outputs] float32
    ranks,  # [S] int32
    has_gains,  # [S] int32
    weights,  # [parts, num_rows, S] float32, parts NUM_PARTS or 1 with stride 0
    tile_slots,  # [1 + tiles, S] int32
    hidden,  # [NUM_SPLITS, NUM_PARTS, num_rows, S, max_rank]
    num_rows,
    num_outputs,
    max_rank,
    num_slots,
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
    own = tl.load(tile_slots + (tile + 1) * num_slots + entries, mask=entries < num_slots, other=-1)
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
    b_rows = b + outputs.to(tl.int64)[:, None] * (num_slots * max_rank)
    b_pointers = b_rows + (slots * max_rank + wanted)[None, :]
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
            places = ((split * NUM_PARTS + part) * num_rows + rows).to(tl.int64)[None, :] * num_slots + slots[:, None]
            source = hidden + places * max_rank + wanted[:, None]
            inside = is_there[:, None] & (rows < num_rows)[None, :]
            values += tl.load(source, mask=inside, other=0.0).to(tl.float32)
        entry = (number + 1) % groups * TILE_ENTRIES + inner // TILE_RANKS
        wanted = (number + 1) // groups * TILE_RANKS + inner % TILE_RANKS
        slots = tl.gather(own, entry, 0)
        is_there = (slots >= 0) & (wanted < tl.gather(own_ranks, entry, 0))
        b_pointers = b_rows + (slots * max_rank + wanted)[None, :]
        b_next = tl.load(b_pointers, mask=in_range[:, None] & is_there[None, :], other=0.0)
        acc = tl.dot(b_tile, values.to(b_tile.dtype), acc, input_precision="ieee")
    own_gained = tl.where(own < 0, 0, tl.gather(all_gained, tl.maximum(own, 0), 0))
    if tl.max(own_gained, axis=0) != 0:
        product = before
        if HAS_BIAS:
            product = before - tl.load(bias + outputs, mask=in_range, other=0.0).to(tl.float32)[:, None]
        for index in range(0, tl.sum((own >= 0).to(tl.int32), axis=0)):
            slot = tl.load(tile_slots + (tile + 1) * num_slots + index)
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
    config = config or default_config(x.shape[1])
    hidden = shrink(x, layer, rows, inputs_per_split=config.inputs_per_split, pdl=pdl)
    expand(y, bias, hidden, layer, rows, config=config, pdl=pdl)


def shrink(
    x: Tensor,
    layer: LoraLayer,
    rows: LoraRows,
    *,
    inputs_per_split: int | None = None,
    fill: bool = False,
    pdl: bool = False,
) -> Tensor:
    """A x times the rows' weights: [splits to be added up, P, T, S, R] of x's dtype.

    Written for slots that any row takes: zeros where a row's tile takes none of it, and beyond a slot's rank. With
    fill also for other slots in the same ``READ_COLUMNS``. With pdl a kernel that is launched next may begin when x is
    there: it must wait before it reads the result.
    """
    num_rows, num_inputs = x.shape
    num_slots, num_parts, max_rank, _ = layer.a.shape
    inputs_per_split = inputs_per_split or default_config(num_inputs).inputs_per_split
    check_dtype("x", x, FLOAT_DTYPES)
    check_dtype("a", layer.a, (x.dtype,))
    check_shape("a", layer.a, (num_slots, num_parts, max_rank, num_inputs))
    check_last_contiguous("x", x)
    num_tiles, weights, strides = checked_rows(layer, rows, num_rows)
    num_splits = triton.cdiv(num_inputs, inputs_per_split)
    hidden = torch.empty(num_splits, num_parts, num_rows, num_slots, max_rank, dtype=x.dtype, device=x.device)
    if num_rows:
        rank_tiles = triton.cdiv(max_rank, _TILE_RANKS)
        share_inputs = _SHARE_BYTES // x.element_size()
        _shrink_kernel[(num_tiles, num_slots * num_parts * rank_tiles, num_splits)](
            x, layer.a, layer.ranks, weights, rows.tile_slots, hidden, num_rows, num_inputs, max_rank, num_slots,
            inputs_per_split, x.stride(0), *strides, NUM_PARTS=num_parts, TILE_ROWS=TILE_ROWS,
            TILE_RANKS=_TILE_RANKS, SHARES=_SHARES, SHARE_INPUTS=share_inputs,
            STEPS=triton.cdiv(min(inputs_per_split, num_inputs), _SHARES * share_inputs),
            PADDED_SLOTS=triton.next_power_of_2(num_slots), FILL=fill,
            TILES=max(_FILLED_TILES, triton.next_power_of_2(num_tiles)) if fill else 1, PDL=pdl, num_warps=_SHARES,
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
    """The rest of ``add_lora``. hidden: what ``shrink`` has made."""
    num_rows, num_outputs = y.shape
    num_slots, num_parts, max_rank, num_inputs = layer.a.shape
    config = config or default_config(num_inputs)
    for name, tensor in (("y", y), ("b", layer.b)):
        check_dtype(name, tensor, (layer.a.dtype,))
    check_shape("b", layer.b, (num_slots, num_outputs, max_rank))
    check_last_contiguous("b", layer.b.transpose(0, 1), 3)
    check_shape("y", y, (num_rows, sum(layer.part_sizes)))
    check_last_contiguous("y", y)
    num_tiles, weights, strides = checked_rows(layer, rows, num_rows)
    check_shape("hidden", hidden, (-1, num_parts, num_rows, num_slots, max_rank))
    if not num_rows:
        return
    sizes = (*layer.part_sizes, 0, 0)[:MAX_PARTS]
    output_tiles = sum(triton.cdiv(size, config.tile_outputs) for size in sizes)
    _expand_kernel[(num_tiles, output_tiles)](
        y, bias, layer.b, layer.gains, layer.ranks, layer.has_gains, weights, rows.tile_slots, hidden, num_rows,
        num_outputs, max_rank, num_slots, y.stride(0), *strides, SIZE0=sizes[0], SIZE1=sizes[1],
        SIZE2=sizes[2], NUM_PARTS=num_parts, NUM_SPLITS=hidden.shape[0], TILE_ROWS=TILE_ROWS, TILE_RANKS=_TILE_RANKS,
        TILE_OUTPUTS=config.tile_outputs, TILE_ENTRIES=config.tile_entries,
        PADDED_SLOTS=max(triton.next_power_of_2(num_slots), config.tile_entries), HAS_BIAS=bias is not None,
        PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def checked_rows(layer: LoraLayer, rows: LoraRows, num_rows: int) -> tuple[int, Tensor, tuple[int, int]]:
    """Tiles of rows, the weights of the layer's first part, and the strides of weights by part and by row."""
    num_tiles, num_slots = triton.cdiv(num_rows, TILE_ROWS), layer.a.shape[0]
    check_shape("tile_slots", rows.tile_slots, (1 + num_tiles, num_slots))
    check_shape("weights", rows.weights, (rows.weights.shape[0], num_rows, num_slots))
    check_last_contiguous("weights", rows.weights)
    weights = rows.part_weights(layer.first_target)
    return num_tiles, weights, (0 if rows.weights.shape[0] == 1 else rows.weights.stride(0), weights.stride(0))
