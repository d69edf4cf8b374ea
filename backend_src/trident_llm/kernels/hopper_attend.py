"""Groups of four warps that attend with 64 query rows each, in Gluon for Hopper: the online softmax of one tile of keys
beside the matrix products of the next scores and the last output. Loads nothing but what ``hopper_load`` brings.

FlashAttention-3, Shah et al. 2024.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_barriers import barrier, release, wait_for
from .hopper_load import CHUNK, GROUP_ROWS, count_tiles, locate, take_item

_NEEDED: gl.constexpr = gl.constexpr(
    "{ .reg .pred never; setp.lt.f32 never, $1, 0f00000000; @never nanosleep.u32 1; mov.b32 $0, $1; }"
)


@gluon.jit
def _start_scores(q_tile, k_tile, LAYOUT: gl.constexpr):
    """Start q k^T."""
    TILE_KEYS: gl.constexpr = k_tile.shape[0]
    zeros = gl.zeros([GROUP_ROWS, TILE_KEYS], gl.float32, layout=LAYOUT)
    return warpgroup_mma(q_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _softmax(scores, row_max, row_sum, first_key, upper, factor, MASKED: gl.constexpr):
    """Fold scores of keys from first_key on into (row_max, row_sum): see ``attention_tile._attend_tile``."""
    if MASKED:
        TILE_KEYS: gl.constexpr = scores.shape[1]
        LAYOUT: gl.constexpr = scores.type.layout
        keys = first_key + gl.arange(0, TILE_KEYS, layout=gl.SliceLayout(0, LAYOUT))
        scores = gl.where(keys[None, :] < upper[:, None], scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, 1) * factor)
    decay = gl.exp2(row_max - new_max)
    probs = gl.exp2(scores * factor - new_max[:, None])
    return probs, new_max, row_sum * decay + gl.sum(probs, 1), decay


@gluon.jit
def _computed(row_sum):
    """row_sum, with an instruction that needs it and across which no wait is moved.

    ptxas would move the wait for a product up, before the exponentials that are to be computed beside it.
    """
    return gl.inline_asm_elementwise(_NEEDED, "=r,r", [row_sum], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _clear_rows(v_tile, first, end) -> None:
    """Make rows first to end of a tile of V zero; end is a multiple of 8.

    Both groups of warps do so, each before its own product: they write the same.
    """
    TILE_KEYS: gl.constexpr = v_tile.shape[0]
    CHUNKS: gl.constexpr = v_tile.shape[1] // CHUNK
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    parts = v_tile._reinterpret(v_tile.dtype, [CHUNKS * TILE_KEYS // 8, 8, CHUNK], v_tile.layout)
    rows = gl.arange(0, 8, layout=gl.SliceLayout(1, LAYOUT))
    for part in range(first // 8, end // 8):
        keep = part * 8 + rows < first
        for chunk in gl.static_range(CHUNKS):
            target = parts.index(chunk * (TILE_KEYS // 8) + part)
            values = target.load(LAYOUT)
            target.store(gl.where(keep[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
    barrier()


@gluon.jit
def _attend_keys(
    acc,  # [64, D] float32: unnormalised output, without the tile of keys that probs belong to
    probs,  # [64, TILE_KEYS]
    row_max,  # [64] float32
    row_sum,  # [64] float32
    q_tile,  # [64, D]
    ring,
    count,  # of the tile of keys that probs belong to: see load_tiles
    last,
    first,
    upper,  # [64]: one past the last key a row sees
    factor,
    MASKED: gl.constexpr,
    SCORES: gl.constexpr,
    PROBS: gl.constexpr,
):
    """Tiles of keys from ``last`` down to ``first``: each one's scores beside the product of the last probs with V."""
    k_shared, v_shared, kv_full, kv_empty = ring
    STAGES: gl.constexpr = k_shared.shape[0]
    TILE_KEYS: gl.constexpr = k_shared.shape[1]
    # Run at least once: see attention_tile.attend_keys.
    if last >= first:
        for tile in range(0, last - first + 1):
            stage = (count + 1) % STAGES
            v_stage = count % STAGES
            wait_for(kv_full, stage, (count + 1) // STAGES & 1)
            scores = _start_scores(q_tile, k_shared.index(stage), SCORES)
            wait_for(kv_full, STAGES + v_stage, count // STAGES & 1)
            acc = warpgroup_mma(probs, v_shared.index(v_stage), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            release(kv_empty, stage)
            values, row_max, row_sum, decay = _softmax(
                scores, row_max, row_sum, (last - tile) * TILE_KEYS, upper, factor, MASKED
            )
            row_sum = _computed(row_sum)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            release(kv_empty, STAGES + v_stage)
            acc *= gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
            probs = gl.convert_layout(values.to(probs.dtype), PROBS)
            count += 1
    return acc, probs, row_max, row_sum, count


@gluon.jit
def attend_tiles(
    out,
    queries,
    ring,
    sequences,
    factor,
    stride_out_token,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    PADDED_GROUP: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    WARP_GROUP: gl.constexpr,
):
    """What group of warps 0 or 1 does. Arguments as in the kernel."""
    q_shared, q_full, q_empty = queries
    k_shared, v_shared, kv_full, kv_empty = ring
    STAGES: gl.constexpr = k_shared.shape[0]
    TILE_KEYS: gl.constexpr = k_shared.shape[1]
    HEAD_DIM: gl.constexpr = k_shared.shape[2]
    GROUP_TOKENS: gl.constexpr = GROUP_ROWS // PADDED_GROUP
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    PROBS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    q_tile = q_shared.index(WARP_GROUP)
    rows = gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SCORES))
    out_rows = gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, OUT))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))

    tiles = count_tiles(sequences, 2 * GROUP_TOKENS)
    num_items = tiles[0] * NUM_KV_HEADS
    q_count = 0
    count = 0
    for turn in range(0, (num_items + gl.num_programs(0) - 1) // gl.num_programs(0)):
        item = take_item(turn)
        _seq, start, num_tokens, context, first_token, key_tiles = locate(
            item, tiles, sequences, NUM_KV_HEADS, 2 * GROUP_TOKENS, TILE_KEYS
        )
        if key_tiles > 0:
            first_position = context - num_tokens + first_token
            own_token = first_token + WARP_GROUP * GROUP_TOKENS
            upper = context - num_tokens + own_token + rows // PADDED_GROUP + 1
            # Tiles of keys before this one are seen by every row.
            full_tiles = gl.minimum((first_position + 1) // TILE_KEYS, key_tiles - 1)

            stage = count % STAGES
            phase = count // STAGES & 1
            wait_for(q_full, WARP_GROUP, q_count & 1)
            wait_for(kv_full, stage, phase)
            scores = warpgroup_mma_wait(0, deps=(_start_scores(q_tile, k_shared.index(stage), SCORES),))
            release(kv_empty, stage)
            row_max = gl.full([GROUP_ROWS], -1e30, gl.float32, layout=gl.SliceLayout(1, SCORES))
            row_sum = gl.zeros([GROUP_ROWS], gl.float32, layout=gl.SliceLayout(1, SCORES))
            values, row_max, row_sum, _decay = _softmax(
                scores, row_max, row_sum, (key_tiles - 1) * TILE_KEYS, upper, factor, True
            )
            probs = gl.convert_layout(values.to(q_shared.dtype), PROBS)
            acc = gl.zeros([GROUP_ROWS, HEAD_DIM], gl.float32, layout=SUMS)
            # A block's rows past the context get probability 0, but 0 times what they hold may be NaN.
            if (context % BLOCK_SIZE != 0) & (key_tiles * TILE_KEYS > context):
                used = context - (key_tiles - 1) * TILE_KEYS
                wait_for(kv_full, STAGES + stage, phase)
                _clear_rows(v_shared.index(stage), used, (used + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE)

            acc, probs, row_max, row_sum, count = _attend_keys(
                acc, probs, row_max, row_sum, q_tile, ring, count, key_tiles - 2, full_tiles,
                upper, factor, True, SCORES, PROBS,
            )  # fmt: skip
            acc, probs, row_max, row_sum, count = _attend_keys(
                acc, probs, row_max, row_sum, q_tile, ring, count, full_tiles - 1, 0,
                upper, factor, False, SCORES, PROBS,
            )  # fmt: skip
            release(q_empty, WARP_GROUP)
            stage = count % STAGES
            wait_for(kv_full, STAGES + stage, count // STAGES & 1)
            acc = warpgroup_mma(probs, v_shared.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            release(kv_empty, STAGES + stage)
            count += 1
            q_count += 1

            # Every row that is written sees at least itself.
            acc *= gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, SUMS))[:, None]
            result = gl.convert_layout(acc.to(out.dtype.element_ty), OUT)
            token = own_token + out_rows // PADDED_GROUP
            head = item % NUM_KV_HEADS * GROUP + out_rows % PADDED_GROUP
            valid = (token < num_tokens) & (out_rows % PADDED_GROUP < GROUP)
            target = (start + token).to(gl.int64) * stride_out_token + head * HEAD_DIM
            gl.store(out + target[:, None] + dims[None, :], result, mask=valid[:, None] & (dims >= 0)[None, :])
