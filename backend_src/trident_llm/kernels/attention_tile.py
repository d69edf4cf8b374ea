"""Online softmax over tiles of paged keys: what prefill and decode attention share.

Milakov and Gimelshein 2018 (online softmax); Dao et al. 2022 (FlashAttention). Knows no grid and no sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape
from .layer_cache import LayerCache, check_layer_cache

_LOG2_E = math.log2(math.e)
_V_SCALE_UNIT: tl.constexpr = tl.constexpr(4096.0)
"""Scales of V are small, and probabilities smaller: float16 would lose their product, but holds it in this unit."""


@dataclass(frozen=True)
class ScoreScale:
    """Constants that turn q.k into a base-2 logit: q.k * factor, or cap * tanh of it (see ``score_scale``)."""

    factor: float
    cap: float


def check_operands(
    q: Tensor, cache: LayerCache, seq_counts: Tensor, out: Tensor, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
) -> None:
    """Raise TypeError or ValueError unless these operands of an attention kernel fit together; q [rows, Hq, D]."""
    check_dtype("q", q, dtypes)
    check_layer_cache(cache, q.shape[-1])
    check_last_contiguous("q", q, 2)
    check_dtype("seq_counts", seq_counts, (torch.int32,))
    check_shape("out", out, tuple(q.shape))
    check_last_contiguous("out", out, 2)


def score_scale(scale: float, soft_cap: float | None) -> ScoreScale:
    """Fold log2(e), and tanh(y) = 1 - 2 / (exp(2 y) + 1) where there is a soft cap, into two constants."""
    if scale <= 0:
        raise ValueError(f"scale is {scale}; it must be positive")
    if soft_cap is None:
        return ScoreScale(scale * _LOG2_E, 0.0)
    return ScoreScale(2.0 * _LOG2_E * scale / soft_cap, soft_cap * _LOG2_E)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 must not fall to tf32, whose error is that of a 10-bit mantissa."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def _attend_tile(
    acc,  # [ROWS, PADDED_DIM] float32: unnormalised output, in a unit of its own if SCALED
    row_max,  # [ROWS] float32, finite from the start so that a fully masked tile gives exp2(-inf) = 0
    row_sum,  # [ROWS] float32
    q,  # [ROWS, PADDED_DIM]
    first_key,
    lower,  # [ROWS]: the first key a row sees; unused unless HAS_LOWER
    upper,  # [ROWS]: one past the last key a row sees
    num_keys,  # keys at and beyond it are not in the cache
    kv_cache,  # [num_blocks, BLOCK_SIZE, 2, NUM_KV_HEADS, HEAD_DIM]
    kv_scales,  # [num_blocks, BLOCK_SIZE, 2, NUM_KV_HEADS] float32; unused unless SCALED
    table,  # [max_blocks] int32: the sequence's blocks
    kv_head,
    score_factor,
    score_cap,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LOWER: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold keys first_key .. first_key + TILE_KEYS into (acc, row_max, row_sum)."""
    keys = first_key + tl.arange(0, TILE_KEYS)
    dims = tl.arange(0, PADDED_DIM)
    if MASKED:
        cached = keys < num_keys
        blocks = tl.load(table + keys // BLOCK_SIZE, mask=cached, other=0)
    else:
        blocks = tl.load(table + keys // BLOCK_SIZE)
    slots = blocks.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
    rows = slots * (2 * NUM_KV_HEADS) + kv_head
    k_pointers = kv_cache + rows[:, None] * HEAD_DIM + dims[None, :]
    v_pointers = k_pointers + NUM_KV_HEADS * HEAD_DIM
    # A key outside the cache gets probability 0, and 0 times a stray infinity would be NaN: V is loaded as 0.
    if PADDED_DIM != HEAD_DIM:
        inside = (dims < HEAD_DIM)[None, :]
        k = tl.load(k_pointers, mask=inside, other=0.0)
        if MASKED:
            v = tl.load(v_pointers, mask=inside & cached[:, None], other=0.0)
        else:
            v = tl.load(v_pointers, mask=inside, other=0.0)
    else:
        k = tl.load(k_pointers)
        if MASKED:
            v = tl.load(v_pointers, mask=cached[:, None], other=0.0)
        else:
            v = tl.load(v_pointers)

    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
    if SCALED:
        scores *= tl.load(kv_scales + rows)[None, :]
    if HAS_CAP:
        scores = score_cap * (1.0 - 2.0 / (tl.exp2(scores * score_factor) + 1.0))
    if MASKED:
        visible = keys[None, :] < upper[:, None]
        if HAS_LOWER:
            visible = visible & (keys[None, :] >= lower[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    # The factor is positive: scaling the maximum, not every score, leaves one multiply-add per score.
    if HAS_CAP:
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        probs = tl.exp2(scores - new_max[:, None])
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * score_factor)
        probs = tl.exp2(scores * score_factor - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(probs, 1)
    if SCALED:
        # Scales outside the cache are not trusted either: see V above.
        if MASKED:
            v_scales = tl.load(kv_scales + rows + NUM_KV_HEADS, mask=cached, other=0.0)
        else:
            v_scales = tl.load(kv_scales + rows + NUM_KV_HEADS)
        probs *= (v_scales * _V_SCALE_UNIT)[None, :]
    acc = tl.dot(probs.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def attend_keys(
    acc,
    row_max,
    row_sum,
    q,
    begin,
    end,
    lower,
    upper,
    num_keys,
    kv_cache,
    kv_scales,
    table,
    kv_head,
    score_factor,
    score_cap,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LOWER: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``_attend_tile`` over the tiles from begin to end; arguments as there."""
    # A loop that may run zero times makes ptxas wait for every matrix instruction of it (its note C7515): the
    # accumulators would be defined on the way around the loop too. Inside the condition it runs at least once.
    if begin < end:
        for key in range(begin, end, TILE_KEYS):
            acc, row_max, row_sum = _attend_tile(
                acc, row_max, row_sum, q, key, lower, upper, num_keys, kv_cache, kv_scales, table, kv_head,
                score_factor, score_cap, NUM_KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE_KEYS,
                MASKED, HAS_LOWER, HAS_CAP, SCALED, PRECISION,
            )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit
def attended(acc, row_sum, SCALED: tl.constexpr):
    """The output of finished accumulators; zeros for a row that has seen no key."""
    total = tl.where(row_sum > 0, row_sum, 1.0)
    if SCALED:
        total *= _V_SCALE_UNIT
    return acc / total[:, None]
