"""Paged attention for sequences with one new token: the context is split over programs, then the parts are combined.

The grid depends on the batch bucket alone; context lengths are read on the device, so a CUDA graph serves any of them.
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

_PROGRAMS_PER_PROCESSOR = 5
"""Programs whose registers and shared memory one multiprocessor of Hopper holds at once."""
_MIN_SPLIT_KEYS = 128
"""Fewer keys than this are not worth a program of their own."""
_MAX_SPLITS = 64
"""One program combines all splits of a head in its registers."""
_MANY_SPLITS = 16
"""From so many on a split is short: smaller tiles then leave fewer programs without keys."""


@dataclass(frozen=True)
class DecodeConfig:
    """How the keys are cut."""

    tile_keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DecodeWorkspace:
    """Parts of the output, one per split. Not needed, and empty, with one split."""

    partials: Tensor
    """[S, Hq, num_splits, D] float32: softmax-weighted sums of V, each normalised over its own keys."""
    log_sums: Tensor
    """[S, Hq, num_splits] float32: base-2 logarithm of each part's sum of exponentials."""


def choose_num_splits(num_seqs: int, num_kv_heads: int, max_context: int, num_processors: int) -> int:
    """Splits that fill the processors, given only what a batch bucket fixes. ``max_context``: of the block tables."""
    wanted = num_processors * _PROGRAMS_PER_PROCESSOR // (num_seqs * num_kv_heads)
    return max(1, min(wanted, -(-max_context // _MIN_SPLIT_KEYS), _MAX_SPLITS))


def allocate_workspace(
    num_seqs: int, num_heads: int, num_splits: int, head_dim: int, device: torch.device
) -> DecodeWorkspace:
    shape = (num_seqs, num_heads, num_splits) if num_splits > 1 else (0,)
    return DecodeWorkspace(
        torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
    )


@triton.jit
def _keys_per_split(num_keys, NUM_SPLITS: tl.constexpr, TILE_KEYS: tl.constexpr):
    """Whole tiles, and at least one: short contexts use fewer splits than there are programs."""
    return max(tl.cdiv(tl.cdiv(num_keys, NUM_SPLITS), TILE_KEYS), 1) * TILE_KEYS


@triton.jit
def _split_attention_kernel(
    q,  # [S, Hq, HEAD_DIM]
    kv_cache,  # [num_blocks, BLOCK_SIZE, 2, NUM_KV_HEADS, HEAD_DIM]
    kv_scales,  # [num_blocks, BLOCK_SIZE, 2, NUM_KV_HEADS] float32; unused unless SCALED
    block_tables,  # [S, max_blocks] int32
    context_lens,  # [S] int32; 0 for a row that pads the batch
    seq_counts,  # [2] int32: rows from the first number on are none of this kernel's, and are not written
    out,  # [S, Hq, HEAD_DIM]; written here with one split only
    partials,  # [S, Hq, NUM_SPLITS, HEAD_DIM] float32
    log_sums,  # [S, Hq, NUM_SPLITS] float32
    score_factor,
    score_cap,
    window,
    stride_q_token,
    stride_table,
    stride_out_token,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
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
    # KV heads vary fastest: programs that run together then read neighbouring parts of the same slots.
    kv_head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    context = tl.load(context_lens + seq)
    is_decode = seq < tl.load(seq_counts)
    first_key = 0
    if HAS_WINDOW:
        first_key = max(context - window, 0)
    share = _keys_per_split(context - first_key, NUM_SPLITS, TILE_KEYS)
    begin = first_key + split * share
    end = min(begin + share, context)
    # With one split even an empty row writes its output: padding rows then hold zeros, not stale memory.
    if is_decode & ((begin < end) | (NUM_SPLITS == 1)):
        rows = tl.arange(0, PADDED_GROUP)
        dims = tl.arange(0, PADDED_DIM)
        head = kv_head * GROUP + rows
        inside = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        q_tile = tl.load(
            q + seq * stride_q_token + (head * HEAD_DIM)[:, None] + dims[None, :], mask=inside, other=0.0
        )
        acc = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
        row_max = tl.full([PADDED_GROUP], -1e30, tl.float32)
        row_sum = tl.zeros([PADDED_GROUP], tl.float32)
        upper = end + tl.zeros([PADDED_GROUP], tl.int32)
        table = block_tables + seq * stride_table
        full_end = begin + (end - begin) // TILE_KEYS * TILE_KEYS
        acc, row_max, row_sum = attend_keys(
            acc, row_max, row_sum, q_tile, begin, full_end, upper, upper, end, kv_cache, kv_scales, table, kv_head,
            score_factor, score_cap, NUM_KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE_KEYS,
            False, False, HAS_CAP, SCALED, PRECISION,
        )  # fmt: skip
        acc, row_max, row_sum = attend_keys(
            acc, row_max, row_sum, q_tile, full_end, end, upper, upper, end, kv_cache, kv_scales, table, kv_head,
            score_factor, score_cap, NUM_KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE_KEYS,
            True, False, HAS_CAP, SCALED, PRECISION,
        )  # fmt: skip
        result = attended(acc, row_sum, SCALED)
        if NUM_SPLITS == 1:
            target = out + seq * stride_out_token + (head * HEAD_DIM)[:, None] + dims[None, :]
            tl.store(target, result.to(out.dtype.element_ty), mask=inside)
        else:
            part = (seq * (NUM_KV_HEADS * GROUP) + head) * NUM_SPLITS + split
            tl.store(partials + part[:, None] * HEAD_DIM + dims[None, :], result, mask=inside)
            tl.store(log_sums + part, row_max + tl.log2(row_sum), mask=rows < GROUP)


@triton.jit
def _combine_splits_kernel(
    partials,  # [S, Hq, NUM_SPLITS, HEAD_DIM] float32
    log_sums,  # [S, Hq, NUM_SPLITS] float32
    context_lens,  # [S] int32
    seq_counts,  # [2] int32
    out,  # [S, Hq, HEAD_DIM]
    window,
    stride_out_token,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    num_keys = tl.load(context_lens + seq)
    if HAS_WINDOW:
        num_keys = min(num_keys, window)
    # Only these splits were written: the others had no keys.
    num_live = tl.cdiv(num_keys, _keys_per_split(num_keys, NUM_SPLITS, TILE_KEYS))
    splits = tl.arange(0, PADDED_SPLITS)
    dims = tl.arange(0, PADDED_DIM)
    live = splits < num_live
    part = (seq * NUM_HEADS + head) * NUM_SPLITS + splits
    logs = tl.load(log_sums + part, mask=live, other=-1e30)
    weights = tl.where(live, tl.exp2(logs - tl.max(logs, 0)), 0.0)
    values = tl.load(
        partials + part[:, None] * HEAD_DIM + dims[None, :],
        mask=live[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    total = tl.sum(weights, 0)
    result = tl.sum(weights[:, None] * values, 0) / tl.where(total > 0, total, 1.0)
    target = out + seq * stride_out_token + head * HEAD_DIM + dims
    tl.store(target, result.to(out.dtype.element_ty), mask=(dims < HEAD_DIM) & (seq < tl.load(seq_counts)))


def decode_attention(
    q: Tensor,
    cache: LayerCache,
    block_tables: Tensor,
    context_lens: Tensor,
    seq_counts: Tensor,
    out: Tensor,
    workspace: DecodeWorkspace,
    *,
    num_splits: int,
    scale: float,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    config: DecodeConfig | None = None,
    pdl: bool = False,
) -> None:
    """Attention of q [S, Hq, D], the last token of each sequence, into out [S, Hq, D].

    cache: of q's dtype, or 8 bits with scales. block_tables [S, max_blocks] int32, context_lens [S] int32; a row with
    context 0 gives zeros.
    seq_counts [2] int32: rows of q and out from seq_counts[0] on belong to other sequences and are left alone.
    workspace: from ``allocate_workspace`` for the same num_splits.
    """
    num_seqs, num_heads = q.shape[:2]
    check_operands(q, cache, seq_counts, out)
    block_size, _, num_kv_heads, head_dim = cache.values.shape[1:]
    check_shape("block_tables", block_tables, (num_seqs, -1))
    config = config or default_config(q.dtype, head_dim, num_splits)
    constants = score_scale(scale, soft_cap)
    group = num_heads // num_kv_heads
    padded_dim = triton.next_power_of_2(head_dim)
    launch = {"launch_pdl": True} if pdl else {}
    _split_attention_kernel[(num_kv_heads, num_seqs, num_splits)](
        q, cache.values, cache.scales, block_tables, context_lens, seq_counts, out, workspace.partials,
        workspace.log_sums, constants.factor, constants.cap, sliding_window or 0,
        q.stride(0), block_tables.stride(0), out.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, PADDED_GROUP=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, PADDED_DIM=padded_dim, BLOCK_SIZE=block_size, TILE_KEYS=config.tile_keys,
        NUM_SPLITS=num_splits, HAS_WINDOW=sliding_window is not None, HAS_CAP=soft_cap is not None,
        SCALED=cache.scales is not None, PRECISION=dot_precision(q.dtype), PDL=pdl,
        num_warps=config.num_warps, num_stages=config.num_stages, **launch,
    )  # fmt: skip
    if num_splits == 1:
        return
    _combine_splits_kernel[(num_heads, num_seqs)](
        workspace.partials, workspace.log_sums, context_lens, seq_counts, out, sliding_window or 0, out.stride(0),
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, TILE_KEYS=config.tile_keys,
        NUM_SPLITS=num_splits, PADDED_SPLITS=triton.next_power_of_2(num_splits),
        HAS_WINDOW=sliding_window is not None, PDL=pdl, num_warps=4, **launch,
    )  # fmt: skip


def default_config(dtype: torch.dtype, head_dim: int, num_splits: int) -> DecodeConfig:
    """The fastest of those timed on an H100 (head_dim 128, contexts of 256 and 2,048)."""
    if dtype == torch.float32:
        # There are no matrix units for it, and both operands of a product pass through registers: large tiles spill.
        return DecodeConfig(16 if head_dim > 64 else 32, 4, 2)
    if head_dim > 128:
        return DecodeConfig(32, 4, 2)
    return DecodeConfig(32, 4, 5) if num_splits >= _MANY_SPLITS else DecodeConfig(64, 4, 2)
