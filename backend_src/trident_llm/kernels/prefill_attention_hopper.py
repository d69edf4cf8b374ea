"""Paged attention for chunks of several tokens on Hopper, by warps of different duties, in Gluon.

One warp fills a ring of K and V tiles; two groups of four warps attend with 64 query rows each, and one's softmax
overlaps the other's matrix products. Programs stay for several tiles of query rows: the next one's keys are under way
while the last one's output is written. FlashAttention-3, Shah et al. 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_tile import check_operands, score_scale
from .checks import HALF_DTYPES
from .hopper_attend import attend_tiles
from .hopper_load import CHUNK, GROUP_ROWS, load_tiles
from .layer_cache import LayerCache

_ATTENDING_REGISTERS, _LOADING_REGISTERS = 232, 40
"""Of a thread. Two groups of warps attend, and together with the loading one share 504."""
_ROWS_LAYOUT, _HEADS_LAYOUT = (gl.NVMMASharedLayout(128, 16, rank=rank) for rank in (2, 3))


@dataclass(frozen=True)
class HopperConfig:
    tile_keys: int
    num_stages: int
    """Tiles of K, and of V, in shared memory."""
    persistent: bool
    """Whether a program works on several tiles of query rows."""


DEFAULT_CONFIG = HopperConfig(128, 2, persistent=True)
"""H200, 2,048 and 8,192 tokens: 491 and 650 TFLOP/s; 459 and 626 with a program for each tile, 463 and 496 with tiles
of 64 keys. With the groups of warps taking turns at the matrix units it was 490 and 598."""


def takes(q: Tensor, cache: LayerCache, soft_cap: float | None, sliding_window: int | None) -> bool:
    """Whether the kernel attends with q [T, Hq, D] to this cache, on a device of compute capability 9.0."""
    block_size, _, num_kv_heads, head_dim = cache.values.shape[1:]
    group = q.shape[1] // num_kv_heads
    return (
        q.dtype in HALF_DTYPES
        and cache.values.dtype == q.dtype
        # The plain kernel is faster with 64: 327 instead of 303 TFLOP/s at 2,048 tokens, 441 instead of 410 at 8,192.
        and head_dim == 128
        and block_size in (8, 16, 32, 64)
        and group <= GROUP_ROWS.value
        # At most a quarter of a tile's rows is padding.
        and 4 * group >= 3 * triton.next_power_of_2(group)
        and soft_cap is None
        and sliding_window is None
    )


@gluon.jit
def _hopper_prefill_attention_kernel(
    q_heads,  # [T, Hq, HEAD_DIM], in boxes of [64 / PADDED_GROUP, PADDED_GROUP, 64]
    cache_rows,  # [num_blocks * BLOCK_SIZE, 2 * NUM_KV_HEADS * HEAD_DIM], in boxes of [BLOCK_SIZE, 64]
    block_tables,  # [S, max_blocks] int32
    cu_seqlens_q,  # [S + 1] int32: rows on the token axis of q and out
    context_lens,  # [S] int32
    seq_counts,  # [2] int32: the first sequence with several tokens, and the number of sequences
    out,  # [T, Hq, HEAD_DIM]
    num_cached_rows,
    score_factor,
    stride_table,
    stride_out_token,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    TILE_KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    ATTENDING_REGISTERS: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    DTYPE: gl.constexpr = q_heads.dtype
    BLOCK_SIZE: gl.constexpr = cache_rows.block_shape[0]
    PADDED_GROUP: gl.constexpr = q_heads.block_shape[1]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_shared = gl.allocate_shared_memory(DTYPE, [2, GROUP_ROWS, HEAD_DIM], cache_rows.layout)
    k_shared = gl.allocate_shared_memory(DTYPE, [STAGES, TILE_KEYS, HEAD_DIM], cache_rows.layout)
    v_shared = gl.allocate_shared_memory(DTYPE, [STAGES, TILE_KEYS, HEAD_DIM], cache_rows.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    kv_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    kv_empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    for index in gl.static_range(2):
        mbarrier.init(q_full.index(index), count=1)
        mbarrier.init(q_empty.index(index), count=1)
    for index in gl.static_range(2 * STAGES):
        mbarrier.init(kv_full.index(index), count=1)
        mbarrier.init(kv_empty.index(index), count=2)
    fence_async_shared()
    queries = (q_shared, q_full, q_empty)
    ring = (k_shared, v_shared, kv_full, kv_empty)
    sequences = (cu_seqlens_q, context_lens, seq_counts)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (attend_tiles, (
                out, queries, ring, sequences, score_factor, stride_out_token,
                NUM_KV_HEADS, GROUP, PADDED_GROUP, BLOCK_SIZE, first,
            )),
            (attend_tiles, (
                out, queries, ring, sequences, score_factor, stride_out_token,
                NUM_KV_HEADS, GROUP, PADDED_GROUP, BLOCK_SIZE, second,
            )),
            (load_tiles, (
                q_heads, cache_rows, queries, ring, sequences, block_tables, stride_table, num_cached_rows,
                NUM_KV_HEADS, GROUP,
            )),
        ],
        [4, 1],
        [ATTENDING_REGISTERS, LOADING_REGISTERS],
    )  # fmt: skip


def prefill_attention_hopper(
    q: Tensor,
    cache: LayerCache,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    seq_counts: Tensor,
    out: Tensor,
    *,
    max_tokens: int,
    max_seqs: int,
    scale: float,
    num_processors: int,
    config: HopperConfig | None = None,
    pdl: bool = False,
) -> None:
    """``prefill_attention`` for what ``takes`` accepts, with arguments as there.

    num_processors: multiprocessors of the device.
    """
    check_operands(q, cache, seq_counts, out, HALF_DTYPES)
    if not takes(q, cache, None, None):
        raise ValueError(f"q is {q.dtype} {tuple(q.shape)}, values {cache.values.dtype} {tuple(cache.values.shape)}")
    block_size, _, num_kv_heads, head_dim = cache.values.shape[1:]
    config = config or DEFAULT_CONFIG
    group = q.shape[1] // num_kv_heads
    padded_group = triton.next_power_of_2(group)
    group_tokens = GROUP_ROWS.value // padded_group
    num_items = (max_tokens // (2 * group_tokens) + max_seqs) * num_kv_heads
    num_programs = min(num_items, num_processors) if config.persistent else num_items
    num_rows, row_size = cache.values.shape[0] * block_size, 2 * num_kv_heads * head_dim
    chunk = CHUNK.value
    q_heads = TensorDescriptor(
        q, list(q.shape), list(q.stride()), [group_tokens, padded_group, chunk], _HEADS_LAYOUT
    )  # fmt: skip
    cache_rows = TensorDescriptor(cache.values, [num_rows, row_size], [row_size, 1], [block_size, chunk], _ROWS_LAYOUT)
    _hopper_prefill_attention_kernel[(num_programs,)](
        q_heads, cache_rows, block_tables, cu_seqlens_q, context_lens, seq_counts, out, num_rows,
        score_scale(scale, None).factor, block_tables.stride(0), out.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, TILE_KEYS=config.tile_keys,
        STAGES=config.num_stages, ATTENDING_REGISTERS=_ATTENDING_REGISTERS,
        LOADING_REGISTERS=_LOADING_REGISTERS, PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
