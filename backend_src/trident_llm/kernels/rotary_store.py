"""Rotary position embedding of q and k, and the store of k and v into the paged cache, in one pass over qkv.

Su et al. 2021 (RoFormer), in the half-split form. An 8-bit cache gets one scale per token, head, and K or V.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape
from .layer_cache import SCALED_LIMITS, LayerCache, check_layer_cache

_HEADS_PER_PROGRAM = 8


@triton.jit
def _quantize(x, scale, LIMIT: tl.constexpr, TO_INTEGERS: tl.constexpr):
    """x / scale, kept within LIMIT, and rounded here where the conversion to the cache's dtype would cut."""
    quotient = tl.clamp(x.to(tl.float32) / scale, -LIMIT, LIMIT)
    if TO_INTEGERS:
        quotient = tl.floor(quotient + 0.5)
    return quotient


@triton.jit
def _rotary_store_kernel(
    qkv,  # [T, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM]; q and k rotated in place
    cos,  # [T, HEAD_DIM]
    sin,  # [T, HEAD_DIM], first half negated
    kv_cache,  # [num_blocks, block_size, 2, NUM_KV_HEADS, HEAD_DIM]
    kv_scales,  # [num_blocks, block_size, 2, NUM_KV_HEADS] float32; unused unless SCALED
    slots,  # [T] int64; -1: not stored
    stride_token,
    stride_cos,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    LIMIT: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    HALF: tl.constexpr = HEAD_DIM // 2
    GROUPS: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS + HEADS - 1) // HEADS
    token = (tl.program_id(0) // GROUPS).to(tl.int64)
    head = (tl.program_id(0) % GROUPS * HEADS + tl.arange(0, HEADS))[:, None]
    dims = tl.arange(0, PADDED_HALF)[None, :]
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (dims < HALF)
    rotated = head < NUM_HEADS + NUM_KV_HEADS

    first = qkv + token * stride_token + head * HEAD_DIM + dims
    low = tl.load(first, mask=inside, other=0.0)
    high = tl.load(first + HALF, mask=inside, other=0.0)
    angle = token * stride_cos + dims
    half = dims < HALF
    cos_low = tl.load(cos + angle, mask=half, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + angle + HALF, mask=half, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + angle, mask=half, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + angle + HALF, mask=half, other=0.0).to(tl.float32)
    turned_low = (low.to(tl.float32) * cos_low + high.to(tl.float32) * sin_low).to(low.dtype)
    turned_high = (high.to(tl.float32) * cos_high + low.to(tl.float32) * sin_high).to(low.dtype)
    low = tl.where(rotated, turned_low, low)
    high = tl.where(rotated, turned_high, high)
    tl.store(first, low, mask=inside & rotated)
    tl.store(first + HALF, high, mask=inside & rotated)

    slot = tl.load(slots + token)
    if slot >= 0:
        # Rows of the cache follow the KV heads of qkv: k heads, then v heads.
        row = slot * (2 * NUM_KV_HEADS) + head - NUM_HEADS
        stored = inside & (head >= NUM_HEADS)
        if SCALED:
            largest = tl.maximum(tl.max(tl.abs(low.to(tl.float32)), 1), tl.max(tl.abs(high.to(tl.float32)), 1))
            scale = tl.maximum(largest, 1e-12)[:, None] / LIMIT
            tl.store(kv_scales + row, scale, mask=(head >= NUM_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS))
            kept_low = _quantize(low, scale, LIMIT, kv_cache.dtype.element_ty.is_int())
            kept_high = _quantize(high, scale, LIMIT, kv_cache.dtype.element_ty.is_int())
        else:
            kept_low = low
            kept_high = high
        target = kv_cache + row * HEAD_DIM + dims
        tl.store(target, kept_low.to(kv_cache.dtype.element_ty), mask=stored)
        tl.store(target + HALF, kept_high.to(kv_cache.dtype.element_ty), mask=stored)


def rotary_embed_and_store_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: LayerCache,
    slots: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Rotate the q and k heads of qkv [T, Hq + 2 * Hkv, D] in place; write k and v to slots [T] int64 of the cache.

    cos, sin: [T, 1, D] or [T, D], gathered by position, the first half of sin negated. A slot of -1 is not written.
    """
    num_tokens, num_rows, head_dim = qkv.shape
    check_dtype("qkv", qkv, FLOAT_DTYPES)
    check_layer_cache(cache, head_dim)
    num_kv_heads = cache.values.shape[3]
    check_last_contiguous("qkv", qkv, 2)
    check_last_contiguous("cos", cos)
    check_shape("slots", slots, (num_tokens,))
    if cos.stride() != sin.stride() or cos.shape != sin.shape:
        raise ValueError("cos and sin must have the same shape and strides")
    if num_tokens == 0:
        return
    # One axis: the others of a grid end at 65,535.
    _rotary_store_kernel[(triton.cdiv(num_rows, _HEADS_PER_PROGRAM) * num_tokens,)](
        qkv, cos, sin, cache.values, cache.scales, slots, qkv.stride(0), cos.stride(0),
        NUM_HEADS=num_rows - 2 * num_kv_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        PADDED_HALF=triton.next_power_of_2(head_dim // 2), HEADS=_HEADS_PER_PROGRAM,
        LIMIT=SCALED_LIMITS.get(cache.values.dtype, 0.0), SCALED=cache.scales is not None, PDL=pdl,
        num_warps=4 if num_tokens < 64 else 2, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
