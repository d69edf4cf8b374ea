"""Paged attention in torch: gathers a sequence's blocks and hands them to scaled_dot_product_attention.

Which blocks, rows and masks belong together is worked out once a step (``plan_attention``), not once a layer.
Gathering is cheap beside attention itself, at 512 tokens of context 6 us against 43 us (2 CPU cores, bf16); from int8
it takes 32 us.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.batch import AttentionMetadata
from .layer_cache import LayerCache

_TILE_ROWS = 128
"""Query rows of a prompt that attend together. Keys after a tile's last row are never touched, which beats one
masked call over the whole prompt by a quarter, and masks stay small."""
_CHEAP_PADDING = 64
"""Padded keys of a sequence that cost less than one more call."""


@dataclass(frozen=True)
class DecodeGroup:
    """G decoding sequences of similar length that attend in one call, padded to the longest."""

    rows: Tensor | None
    """[G] int64 rows on the token axis; None: the first G."""
    block_ids: Tensor
    """[G, blocks] block ids to gather."""
    keys: slice
    """The gathered keys that any of them sees."""
    mask: Tensor | None
    """[G, 1, 1, keys] added to the scores; None: all see all of ``keys``."""


@dataclass(frozen=True)
class Tile:
    """Consecutive query rows of one sequence."""

    rows: slice
    """On the token axis."""
    keys: slice
    """Among the sequence's gathered keys."""
    mask: Tensor | None
    """[rows, keys] added to the scores; None: all see all of ``keys``."""


@dataclass(frozen=True)
class PromptChunk:
    """One sequence with several tokens in this step."""

    block_ids: Tensor
    """[blocks] block ids to gather."""
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class AttentionPlan:
    """How a step's tokens are written and attend; the same for all layers."""

    slots: Tensor
    """[stored] int64 cache slots to write, none negative."""
    stored_rows: Tensor | None
    """[stored] int64 rows on the token axis they come from; None: all rows."""
    decode_groups: tuple[DecodeGroup, ...]
    prompt_chunks: tuple[PromptChunk, ...]
    restore: Tensor | None
    """[T] int64: brings the groups' and chunks' rows, one after another, into token order; None: they are."""


def plan_attention(
    metadata: AttentionMetadata, *, dtype: torch.dtype, sliding_window: int | None = None
) -> AttentionPlan:
    num_decodes = metadata.num_decodes
    assert all(length == 1 for length in metadata.seq_lens_q[:num_decodes])
    slots, stored_rows = metadata.slot_mapping, None
    if bool((slots < 0).any()):
        stored_rows = (slots >= 0).nonzero().flatten()
        slots = slots.index_select(0, stored_rows)
    window = sliding_window or max(metadata.context_lens_host)
    members = _similar_lengths([min(n, window) for n in metadata.context_lens_host[:num_decodes]])
    groups = tuple(_decode_group(metadata, group, window, dtype) for group in members)
    restore = None
    if len(groups) > 1:
        order = [row for group in members for row in group] + list(range(num_decodes, len(metadata.slot_mapping)))
        restore = torch.tensor(order, device=slots.device).argsort()
    return AttentionPlan(slots, stored_rows, groups, tuple(_prompt_chunks(metadata, window, dtype)), restore)


def _similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in groups in which padding to the longest about doubles the work at most."""
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or 2 * lengths[index] + _CHEAP_PADDING < longest:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(index)
    return [sorted(group) for group in groups]


def _decode_group(metadata: AttentionMetadata, members: list[int], window: int, dtype: torch.dtype) -> DecodeGroup:
    device, size = metadata.block_tables.device, metadata.block_size
    lengths = [metadata.context_lens_host[i] for i in members]
    first_blocks = [max(0, n - window) // size for n in lengths]
    # Visible keys of each member, counted from its first gathered block.
    starts = [max(0, n - window) - first * size for n, first in zip(lengths, first_blocks, strict=True)]
    ends = [n - first * size for n, first in zip(lengths, first_blocks, strict=True)]
    num_blocks = -(-max(ends) // size)

    alone = len(members) == metadata.num_decodes
    rows = None if alone else torch.tensor(members, device=device)
    tables = metadata.block_tables[: len(members)] if rows is None else metadata.block_tables.index_select(0, rows)
    if any(first_blocks):
        columns = torch.tensor(first_blocks, device=device).unsqueeze(1) + torch.arange(num_blocks, device=device)
        block_ids = tables.gather(1, columns.clamp_(max=tables.shape[1] - 1))
    else:
        block_ids = tables[:, :num_blocks]

    keys, mask = slice(min(starts), max(ends)), None
    if min(ends) != max(ends) or min(starts) != max(starts):
        position = torch.arange(keys.start, keys.stop, device=device)
        start, end = torch.tensor([starts, ends], device=device).unsqueeze(-1)
        hidden = (position < start) | (position >= end)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        mask = mask.view(len(members), 1, 1, -1)
    return DecodeGroup(rows, block_ids.contiguous(), keys, mask)


def _prompt_chunks(metadata: AttentionMetadata, window: int, dtype: torch.dtype) -> Iterator[PromptChunk]:
    size, row, device = metadata.block_size, metadata.num_decodes, metadata.block_tables.device
    chunks = list(zip(metadata.seq_lens_q, metadata.context_lens_host, strict=True))[metadata.num_decodes :]
    if not chunks:
        return
    band = _causal_band(max(n for n, _ in chunks), max(c for _, c in chunks), window, dtype, device)
    for index, (num_rows, context) in enumerate(chunks, start=metadata.num_decodes):
        start = context - num_rows
        first_block = max(0, start - window + 1) // size
        tiles = []
        for begin in range(0, num_rows, _TILE_ROWS):
            end = min(begin + _TILE_ROWS, num_rows)
            first_key = max(0, start + begin - window + 1)
            keys = slice(first_key - first_block * size, start + end - first_block * size)
            num_keys = keys.stop - keys.start
            before = num_keys - (end - begin)
            mask = band.mask[: end - begin, band.origin - before : band.origin + end - begin]
            tiles.append(Tile(slice(row + begin, row + end), keys, mask if end - begin > 1 else None))
        yield PromptChunk(metadata.block_tables[index, first_block : -(-context // size)], tuple(tiles))
        row += num_rows


@dataclass(frozen=True)
class _Band:
    """The causal mask by distance: every tile's mask is a view of it."""

    mask: Tensor
    """[rows, origin + rows]: column origin + j is the key j places after the tile's first query."""
    origin: int


def _causal_band(num_rows: int, context: int, window: int, dtype: torch.dtype, device: torch.device) -> _Band:
    num_rows = min(num_rows, _TILE_ROWS)
    origin = min(context, window)
    row = torch.arange(num_rows, device=device).unsqueeze(1)
    key = torch.arange(-origin, num_rows, device=device)
    hidden = (key > row) | (key <= row - window)
    return _Band(torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf")), origin)


def paged_attention(
    q: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float, soft_cap: float | None = None
) -> Tensor:
    num_kv_heads, head_dim = cache.values.shape[3:]
    pieces = [_attend_group(q, cache, group, scale, soft_cap) for group in plan.decode_groups]
    for chunk in plan.prompt_chunks:
        blocks = _gather(cache, chunk.block_ids, q.dtype)
        k, v = blocks.view(-1, 2, num_kv_heads, head_dim).permute(1, 2, 0, 3).unsqueeze(2)
        for tile in chunk.tiles:
            # KV heads act as the batch, so that the heads of a group share K and V without a copy.
            queries = q[tile.rows].unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
            shape = (-1, queries.shape[1], -1, -1)
            keys, values = k[:, :, tile.keys].expand(shape), v[:, :, tile.keys].expand(shape)
            out = _attend(queries, keys, values, tile.mask, scale, soft_cap)
            pieces.append(out.permute(2, 0, 1, 3).flatten(1))
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return joined if plan.restore is None else joined.index_select(0, plan.restore)


def _gather(cache: LayerCache, block_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Copies of blocks, [blocks, block_size, 2, Hkv, D]; ``dtype`` is that of an unscaled cache."""
    blocks = cache.values.index_select(0, block_ids)
    if cache.scales is None:
        return blocks
    # Through float32: rounding the scales too would cost more precision than time is saved.
    return blocks.float().mul_(cache.scales.index_select(0, block_ids).unsqueeze(-1)).to(dtype)


def _attend_group(
    q: Tensor, cache: LayerCache, group: DecodeGroup, scale: float, soft_cap: float | None
) -> Tensor:
    """One token of each of G sequences -> [G, Hq * D]. A KV head's query heads act as its query rows."""
    block_size, _, num_kv_heads, head_dim = cache.values.shape[1:]
    num_seqs, num_blocks = group.block_ids.shape
    blocks = _gather(cache, group.block_ids.view(-1), q.dtype)
    kv = blocks.view(num_seqs, num_blocks * block_size, 2, num_kv_heads, head_dim)
    k, v = kv[:, group.keys].permute(2, 0, 3, 1, 4)
    queries = q[:num_seqs] if group.rows is None else q.index_select(0, group.rows)
    out = _attend(queries.unflatten(1, (num_kv_heads, -1)), k, v, group.mask, scale, soft_cap)
    return out.reshape(num_seqs, -1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, soft_cap: float | None
) -> Tensor:
    """q [B, H, M, D], k and v [B, H, N, D], mask added to the scores -> [B, H, M, D]."""
    if soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)).mul_(scale / soft_cap).tanh_().mul_(soft_cap)
    if mask is not None:
        scores.add_(mask)
    return torch.matmul(torch.softmax(scores, -1), v.float()).to(q.dtype)
