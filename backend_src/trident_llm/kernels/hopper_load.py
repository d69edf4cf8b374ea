"""Work of warp-specialized attention, and the warp that loads for it, in Gluon for Hopper: which tile of query rows is
whose, and Q, K and V on their way to shared memory through the tensor memory accelerator. Knows no softmax.

Three tuples go around. queries: Q of two groups of warps [2, 64, D], and barriers "full" and "empty" of each. ring: K
and V [STAGES, TILE_KEYS, D], and such barriers of the stages, V's after K's. sequences: cu_seqlens_q, context_lens and
seq_counts as in ``prefill_attention``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper_barriers import wait_for

GROUP_ROWS: gl.constexpr = gl.constexpr(64)
"""Query rows of a group of warps: those of its matrix instruction."""
CHUNK: gl.constexpr = gl.constexpr(64)
"""Elements of a swizzled row in shared memory, 128 bytes."""


@gluon.jit
def count_tiles(sequences, TILE_TOKENS: gl.constexpr):
    """Number of tiles of query rows, and what finding one needs.

    As in the plain kernel, sequence i owns those from (start_i - start_first) // TILE_TOKENS + i - first on.
    """
    cu_seqlens_q, _context_lens, seq_counts = sequences
    first_seq = gl.load(seq_counts)
    num_seqs = gl.load(seq_counts + 1)
    origin = gl.load(cu_seqlens_q + first_seq)
    num_tiles = (gl.load(cu_seqlens_q + num_seqs) - origin) // TILE_TOKENS + num_seqs - first_seq
    return num_tiles, first_seq, num_seqs, origin


@gluon.jit
def take_item(turn):
    """The program's work of some turn. Programs take items in order, every other time backwards: those that had the
    largest tiles get the smallest ones next."""
    program = gl.program_id(0)
    others = gl.num_programs(0)
    return turn * others + gl.where(turn % 2 == 0, program, others - 1 - program)


@gluon.jit
def locate(
    item, tiles, sequences, NUM_KV_HEADS: gl.constexpr, TILE_TOKENS: gl.constexpr, TILE_KEYS: gl.constexpr
):  # fmt: skip
    """Where an item of work lies: its sequence, that one's first row, tokens and context, the tile's first token, and
    the number of its tiles of keys, 0 if there is no such tile of rows."""
    cu_seqlens_q, context_lens, _seq_counts = sequences
    num_tiles, first_seq, num_seqs, origin = tiles
    # Later tiles see more keys: starting with them leaves short work for the end.
    tile = num_tiles - 1 - item // NUM_KV_HEADS
    seq = first_seq
    end = num_seqs
    while end - seq > 1:
        middle = (seq + end) // 2
        if (gl.load(cu_seqlens_q + middle) - origin) // TILE_TOKENS + middle - first_seq <= tile:
            seq = middle
        else:
            end = middle
    inside = tile >= 0
    start = gl.load(cu_seqlens_q + seq)
    num_tokens = gl.load(cu_seqlens_q + seq + 1, mask=inside, other=0) - start
    context = gl.load(context_lens + seq, mask=inside, other=0)
    first_token = (tile - (start - origin) // TILE_TOKENS - seq + first_seq) * TILE_TOKENS
    end_key = gl.minimum(context - num_tokens + first_token + TILE_TOKENS, context)
    key_tiles = gl.where(inside & (first_token < num_tokens), (end_key + TILE_KEYS - 1) // TILE_KEYS, 0)
    return seq, start, num_tokens, context, first_token, key_tiles


@gluon.jit
def _load_keys(cache_rows, block_rows, column, full, buffers, stage) -> None:
    """Fill a stage with the blocks whose first rows are block_rows.

    It lies in memory as [D / 64, TILE_KEYS, 64]: 64 elements of a block's rows are together.
    """
    BLOCK_SIZE: gl.constexpr = cache_rows.block_shape[0]
    TILE_KEYS: gl.constexpr = buffers.shape[1]
    BLOCKS: gl.constexpr = TILE_KEYS // BLOCK_SIZE
    CHUNKS: gl.constexpr = buffers.shape[2] // CHUNK
    STAGES: gl.constexpr = buffers.shape[0]
    blocks = buffers._reinterpret(buffers.dtype, [STAGES * CHUNKS * BLOCKS, BLOCK_SIZE, CHUNK], cache_rows.layout)
    mbarrier.expect(full, TILE_KEYS * CHUNKS * CHUNK * 2)
    for block in gl.static_range(BLOCKS):
        for chunk in gl.static_range(CHUNKS):
            tma.async_copy_global_to_shared(
                cache_rows,
                [block_rows[block], column + chunk * CHUNK],
                full,
                blocks.index((stage * CHUNKS + chunk) * BLOCKS + block),
            )


@gluon.jit
def load_tiles(
    q_heads,
    cache_rows,
    queries,
    ring,
    sequences,
    block_tables,
    stride_table,
    num_cached_rows,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
):
    """What the loading warp does. Arguments as in the kernel."""
    q_shared, q_full, q_empty = queries
    k_shared, v_shared, kv_full, kv_empty = ring
    STAGES: gl.constexpr = k_shared.shape[0]
    TILE_KEYS: gl.constexpr = k_shared.shape[1]
    HEAD_DIM: gl.constexpr = k_shared.shape[2]
    BLOCK_SIZE: gl.constexpr = cache_rows.block_shape[0]
    CHUNKS: gl.constexpr = HEAD_DIM // CHUNK
    GROUP_TOKENS: gl.constexpr = q_heads.block_shape[0]
    PADDED_GROUP: gl.constexpr = q_heads.block_shape[1]
    q_parts = q_shared._reinterpret(q_shared.dtype, [2 * CHUNKS, GROUP_TOKENS, PADDED_GROUP, CHUNK], q_heads.layout)
    tiles = count_tiles(sequences, 2 * GROUP_TOKENS)
    num_items = tiles[0] * NUM_KV_HEADS
    # Tiles of query rows and of keys so far: they tell the stage, and which of its barriers' phases is meant.
    q_count = 0
    count = 0
    for turn in range(0, (num_items + gl.num_programs(0) - 1) // gl.num_programs(0)):
        item = take_item(turn)
        seq, start, num_tokens, context, first_token, key_tiles = locate(
            item, tiles, sequences, NUM_KV_HEADS, 2 * GROUP_TOKENS, TILE_KEYS
        )
        kv_head = item % NUM_KV_HEADS
        if key_tiles > 0:
            for group in gl.static_range(2):
                wait_for(q_empty, group, (q_count & 1) ^ 1)
                full = q_full.index(group)
                mbarrier.expect(full, GROUP_ROWS * HEAD_DIM * 2)
                for chunk in gl.static_range(CHUNKS):
                    # Rows of other sequences and heads may come along; nothing is written for them.
                    tma.async_copy_global_to_shared(
                        q_heads,
                        [start + first_token + group * GROUP_TOKENS, kv_head * GROUP, chunk * CHUNK],
                        full,
                        q_parts.index(group * CHUNKS + chunk),
                    )
            q_count += 1
            end_key = gl.minimum(context - num_tokens + first_token + 2 * GROUP_TOKENS, context)
            table = block_tables + seq.to(gl.int64) * stride_table
            for tile in range(0, key_tiles):
                first_key = (key_tiles - 1 - tile) * TILE_KEYS
                block_rows = ()  # type: tuple
                for block in gl.static_range(TILE_KEYS // BLOCK_SIZE):
                    key = first_key + block * BLOCK_SIZE
                    inside = key < end_key
                    block_id = gl.load(table + key // BLOCK_SIZE, mask=inside, other=0)
                    # Rows past the cache's end come as zeros: what was there before must not stay, it may be NaN.
                    block_rows = block_rows + (gl.where(inside, block_id * BLOCK_SIZE, num_cached_rows),)
                stage = count % STAGES
                phase = (count // STAGES & 1) ^ 1
                column = kv_head * HEAD_DIM
                wait_for(kv_empty, stage, phase)
                _load_keys(cache_rows, block_rows, column, kv_full.index(stage), k_shared, stage)
                column += NUM_KV_HEADS * HEAD_DIM
                wait_for(kv_empty, STAGES + stage, phase)
                _load_keys(cache_rows, block_rows, column, kv_full.index(STAGES + stage), v_shared, stage)
                count += 1
