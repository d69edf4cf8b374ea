"""Paged attention for chunks of several tokens: one program per tile of query rows, KV head and share of the keys.

The query heads that share a KV head are packed into the rows of a tile, so K and V are read once for all of them.
Sequences of any lengths lie in one launch; no length is needed on the host. Where a second kernel combines the shares:
"Flash-Decoding", Dao et al. 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_tile import attend_keys, attended, check_operands, dot_precision, score_scale
from .checks import check_shape
from .layer_cache import LayerCache

_PROGRAMS_PER_PROCESSOR = 2
"""Programs whose registers and shared memory one multiprocessor of Hopper holds at once."""
_MIN_SPLIT_KEYS = 128
"""Fewer keys than this are not worth a program of their own."""
_MAX_SPLITS = 16


@dataclass(frozen=True)
class PrefillConfig:
    """How the work is cut. ``tile_rows`` counts query rows: tokens times query heads per KV head."""

    tile_rows: int
    tile_keys: int
    num_warps: int
    num_stages: int


def default_config(dtype: torch.dtype, head_dim: int, group: int) -> PrefillConfig:
    """Tiles that fit Hopper's shared memory and registers.

    Many small programs hide each other's latency better than deep pipelines of large ones do. H100, head_dim 128, 2,048
    tokens: 335 TFLOP/s with tiles of 32 keys and 4 warps, 283 with 128 keys, 8 warps and five stages.
    """
    if dtype == torch.float32:
        # Without matrix units both operands of a product pass through registers: large tiles spill.
        config = PrefillConfig(32, 32, 4, 1) if head_dim <= 64 else PrefillConfig(16, 16, 4, 1)
    elif head_dim <= 64:
        config = PrefillConfig(64, 128, 4, 2)
    elif head_dim > 128:
        config = PrefillConfig(128, 64, 8, 2)
    else:
        config = PrefillConfig(128, 32, 4, 3)
    if group > config.tile_rows:
        raise ValueError(f"{group} query heads share a KV head; at most {config.tile_rows} can")
    return config


@dataclass(frozen=True)
class PrefillWorkspace:
    """Parts of the output, one per split."""

    partials: Tensor
    """[T, Hq, num_splits, D] float32: softmax-weighted sums of V, each normalised over its own keys."""
    log_sums: Tensor
    """[T, Hq, num_splits] float32: base-2 logarithm of each part's sum of exponentials; -inf for a part without keys,
    whose sum is not written."""


def choose_prefill_splits(num_tiles: int, num_kv_heads: int, max_keys: int, num_processors: int) -> int:
    """Splits with which ``num_tiles`` tiles of query rows fill the processors. ``max_keys``: that a tile can have.

    A power of 2: a kernel is compiled for each number.
    """
    wanted = num_processors * _PROGRAMS_PER_PROCESSOR // (num_tiles * num_kv_heads)
    most = max(1, min(wanted, -(-max_keys // _MIN_SPLIT_KEYS), _MAX_SPLITS))
    return 1 << (most.bit_length() - 1)


def allocate_prefill_workspace(q: Tensor, num_splits: int) -> PrefillWorkspace:
    """For q [T, Hq, D]. Launches that follow each other on a stream can share it."""
    shape = (*q.shape[:2], num_splits)
    return PrefillWorkspace(
        torch.empty(*shape, q.shape[2], dtype=torch.float32, device=q.device),
        torch.empty(shape, dtype=torch.float32, device=q.device),
    )


@triton.jit
def _prefill_attention_kernel(
    q,  # [T, Hq, HEAD_DIM]
    kv_cache,  # [num_blocks, BLOCK_SIZE, 2, NUM_KV_HEADS, HEAD_DIM]
    kv_scales,  # [num_blocks, BLOCK_SIZE, 2, NUM_KV_HEADS] float32; unused unless SCALED
    block_tables,  # [S, max_blocks] int32
    cu_seqlens_q,  # [S + 1] int32: rows on the token axis of q and out
    context_lens,  # [S] int32
    seq_counts,  # [2] int32: the first sequence with several tokens, and the number of sequences
    out,  # [T, Hq, HEAD_DIM]; written here with one split only
    partials,  # [T, Hq, NUM_SPLITS, HEAD_DIM] float32; unused with one split
    log_sums,  # [T, Hq, NUM_SPLITS] float32; unused with one split
    score_factor,
    score_cap,
    window,
    stride_q_token,
    stride_table,
    stride_out_token,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    TILE_TOKENS: tl.constexpr = TILE_ROWS // GROUP
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    # Sequence i owns tiles from (start_i - start_first) // TILE_TOKENS + i - first on: see the launcher.
    first_seq = tl.load(seq_counts)
    num_seqs = tl.load(seq_counts + 1)
    origin = tl.load(cu_seqlens_q + first_seq)
    num_tiles = (tl.load(cu_seqlens_q + num_seqs) - origin) // TILE_TOKENS + num_seqs - first_seq
    # Later tiles see more keys: starting with them leaves short work for the end.
    tile = num_tiles - 1 - tl.program_id(2)
    seq = first_seq
    end = num_seqs
    while end - seq > 1:
        middle = (seq + end) // 2
        if (tl.load(cu_seqlens_q + middle) - origin) // TILE_TOKENS + middle - first_seq <= tile:
            seq = middle
        else:
            end = middle
    start = tl.load(cu_seqlens_q + seq)
    num_tokens = 0
    if tile >= 0:
        num_tokens = tl.load(cu_seqlens_q + seq + 1) - start
    first_token = (tile - (start - origin) // TILE_TOKENS - seq + first_seq) * TILE_TOKENS
    if (tile >= 0) & (first_token < num_tokens):
        context = tl.load(context_lens + seq)
        first_position = context - num_tokens + first_token
        last_position = min(first_position + TILE_TOKENS, context) - 1

        rows = tl.arange(0, TILE_ROWS)
        dims = tl.arange(0, PADDED_DIM)
        token = first_token + rows // GROUP
        valid = (rows < TILE_TOKENS * GROUP) & (token < num_tokens)
        head = kv_head * GROUP + rows % GROUP
        token_row = (start + token).to(tl.int64)
        inside = valid[:, None] & (dims < HEAD_DIM)[None, :]
        q_tile = tl.load(
            q + (token_row * stride_q_token + head * HEAD_DIM)[:, None] + dims[None, :], mask=inside, other=0.0
        )

        upper = context - num_tokens + token + 1
        lower = upper - window
        acc = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
        row_max = tl.full([TILE_ROWS], -1e30, tl.float32)
        row_sum = tl.zeros([TILE_ROWS], tl.float32)
        table = block_tables + tl.cast(seq, tl.int64) * stride_table

        # Keys [begin, end_key) in three parts: cut by the window, seen by every row, cut by causality.
        end_key = last_position + 1
        begin = 0
        if HAS_WINDOW:
            begin = max(first_position + 1 - window, 0) // TILE_KEYS * TILE_KEYS
        full_end = max((first_position + 1) // TILE_KEYS * TILE_KEYS, begin)
        full_begin = begin
        if HAS_WINDOW:
            full_begin = min(tl.cdiv(max(last_position + 1 - window, 0), TILE_KEYS) * TILE_KEYS, full_end)
        if NUM_SPLITS > 1:
            # Whole tiles, and at least one: the last splits of a short range have no keys.
            share = tl.cdiv(tl.cdiv(end_key - begin, NUM_SPLITS), TILE_KEYS) * TILE_KEYS
            begin = min(begin + split * share, end_key)
            end_key = min(begin + share, end_key)
            full_begin = min(max(full_begin, begin), end_key)
            full_end = min(max(full_end, begin), end_key)
        if HAS_WINDOW:
            acc, row_max, row_sum = attend_keys(
                acc, row_max, row_sum, q_tile, begin, full_begin, lower, upper, context, kv_cache, kv_scales, table,
                kv_head, score_factor, score_cap, NUM_KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE_KEYS,
                True, True, HAS_CAP, SCALED, PRECISION,
            )  # fmt: skip
        acc, row_max, row_sum = attend_keys(
            acc, row_max, row_sum, q_tile, full_begin, full_end, lower, upper, context, kv_cache, kv_scales, table,
            kv_head, score_factor, score_cap, NUM_KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE_KEYS,
            False, False, HAS_CAP, SCALED, PRECISION,
        )  # fmt: skip
        acc, row_max, row_sum = attend_keys(
            acc, row_max, row_sum, q_tile, full_end, end_key, lower, upper, context, kv_cache, kv_scales, table,
            kv_head, score_factor, score_cap, NUM_KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE_KEYS,
            True, HAS_WINDOW, HAS_CAP, SCALED, PRECISION,
        )  # fmt: skip

        result = attended(acc, row_sum, SCALED)
        if NUM_SPLITS == 1:
            tl.store(
                out + (token_row * stride_out_token + head * HEAD_DIM)[:, None] + dims[None, :],
                result.to(out.dtype.element_ty),
                mask=inside,
            )
        else:
            part = (token_row * (NUM_KV_HEADS * GROUP) + head) * NUM_SPLITS + split
            seen = (row_sum > 0)[:, None]
            tl.store(partials + part[:, None] * HEAD_DIM + dims[None, :], result, mask=inside & seen)
            # A row without keys in this split gets -inf here, and thereby no weight.
            tl.store(log_sums + part, row_max + tl.log2(row_sum), mask=valid)


@triton.jit
def _combine_prefill_splits_kernel(
    partials,  # [T, Hq, NUM_SPLITS, HEAD_DIM] float32
    log_sums,  # [T, Hq, NUM_SPLITS] float32
    cu_seqlens_q,  # [S + 1] int32
    seq_counts,  # [2] int32
    out,  # [T, Hq, HEAD_DIM]
    stride_out_token,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(1)
    first_token = tl.load(cu_seqlens_q + tl.load(seq_counts))
    end_token = tl.load(cu_seqlens_q + tl.load(seq_counts + 1))
    token = first_token.to(tl.int64) + tl.program_id(0)
    if token < end_token:
        splits = tl.arange(0, PADDED_SPLITS)
        dims = tl.arange(0, PADDED_DIM)
        part = (token * NUM_HEADS + head) * NUM_SPLITS + splits
        logs = tl.load(log_sums + part, mask=splits < NUM_SPLITS, other=float("-inf"))
        # Every token sees itself, so the maximum is finite.
        weights = tl.exp2(logs - tl.max(logs, 0))
        values = tl.load(
            partials + part[:, None] * HEAD_DIM + dims[None, :],
            mask=(logs > float("-inf"))[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        result = tl.sum(weights[:, None] * values, 0) / tl.sum(weights, 0)
        target = out + token * stride_out_token + head * HEAD_DIM + dims
        tl.store(target, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


def prefill_attention(
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
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    config: PrefillConfig | None = None,
    workspace: PrefillWorkspace | None = None,
    pdl: bool = False,
) -> None:
    """Causal attention of the rows of sequences seq_counts[0] .. seq_counts[1] - 1 of q [T, Hq, D] into those of out.

    cache: of q's dtype, or 8 bits with scales. block_tables [S, max_blocks] int32, cu_seqlens_q [S + 1] int32,
    context_lens [S] int32, seq_counts [2] int32. max_tokens, max_seqs: bounds of those sequences' tokens and number;
    they fix the grid. workspace: from ``allocate_prefill_workspace``; the keys of each tile are split over as many
    programs as it has room for. None: each tile has one program.
    """
    check_operands(q, cache, seq_counts, out)
    block_size, _, num_kv_heads, head_dim = cache.values.shape[1:]
    num_splits = 1
    if workspace is not None:
        num_splits = workspace.partials.shape[2]
        check_shape("partials", workspace.partials, (*q.shape[:2], num_splits, head_dim))
        check_shape("log_sums", workspace.log_sums, (*q.shape[:2], num_splits))
    group = q.shape[1] // num_kv_heads
    config = config or default_config(q.dtype, head_dim, group)
    constants = score_scale(scale, soft_cap)
    # Sequence i needs ceil(n_i / tile) tiles and is given floor(end_i / tile) - floor(start_i / tile) + 1, never fewer.
    num_tiles = max_tokens // (config.tile_rows // group) + max_seqs
    padded_dim = triton.next_power_of_2(head_dim)
    # The splits of a tile run together, and programs beyond the work come last.
    _prefill_attention_kernel[(num_kv_heads, num_splits, num_tiles)](
        q, cache.values, cache.scales, block_tables, cu_seqlens_q, context_lens, seq_counts, out,
        workspace.partials if workspace else None, workspace.log_sums if workspace else None,
        constants.factor, constants.cap, sliding_window or 0,
        q.stride(0), block_tables.stride(0), out.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, PADDED_DIM=padded_dim,
        BLOCK_SIZE=block_size, TILE_ROWS=config.tile_rows, TILE_KEYS=config.tile_keys,
        NUM_SPLITS=num_splits, HAS_WINDOW=sliding_window is not None, HAS_CAP=soft_cap is not None,
        SCALED=cache.scales is not None, PRECISION=dot_precision(q.dtype), PDL=pdl,
        num_warps=config.num_warps, num_stages=config.num_stages, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    if workspace is not None and num_splits > 1:
        _combine_prefill_splits_kernel[(max_tokens, q.shape[1])](
            workspace.partials, workspace.log_sums, cu_seqlens_q, seq_counts, out, out.stride(0),
            NUM_HEADS=q.shape[1], HEAD_DIM=head_dim, PADDED_DIM=padded_dim, NUM_SPLITS=num_splits,
            PADDED_SPLITS=triton.next_power_of_2(num_splits), PDL=pdl,
            num_warps=4, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
