"""The paged attention twin against a loop over tokens in float32."""

from __future__ import annotations

import random

import pytest
import torch

from tests.fakes.layer_caches import contents, layer_cache
from tests.fakes.paged_steps import Chunk, PagedSteps
from trident_llm.kernels import kernels_for

KERNELS = kernels_for(torch.device("cpu"))

MIXED = [Chunk(0, 70, 1), Chunk(1, 4, 1), Chunk(2, 0, 1), Chunk(3, 0, 17), Chunk(4, 30, 33), Chunk(5, 0, 150)]
"""Decodes of unlike lengths, a sequence's first token, whole prompts and a later chunk of one."""


def naive_attention(q, k, v, positions, *, scale, window=None, soft_cap=None):
    """q [M, Hq, D] at ``positions``; k, v [N, Hkv, D] of positions 0 .. N - 1 -> [M, Hq * D]."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for row, position in enumerate(positions):
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(q.shape[1]):
            keys, values = k[first : position + 1, head // group], v[first : position + 1, head // group]
            scores = keys @ q[row, head] * scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            rows.append(torch.softmax(scores, 0) @ values)
    return torch.cat(rows).view(len(positions), -1)


def check(
    chunks, *, heads=(6, 2), head_dim=64, block_size=16, window=None, soft_cap=None, dtype=torch.float32, atol=2e-5,
    cache_dtype=None,
):  # fmt: skip
    num_heads, num_kv_heads = heads
    steps = PagedSteps(6, max_len=160, block_size=block_size)
    metadata = steps.metadata(chunks)
    generator = torch.Generator().manual_seed(0)
    shape = (steps.num_blocks, block_size, 2, num_kv_heads, head_dim)
    # Every slot holds something, so that reading one slot too many shows.
    cache = layer_cache(torch.randn(shape, generator=generator).to(dtype), cache_dtype)
    total = sum(chunk.num_tokens for chunk in chunks)
    qkv = torch.randn(total, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    scale = 1.5 * head_dim**-0.5

    plan = KERNELS.plan_attention(metadata, dtype=dtype, sliding_window=window)
    actual = KERNELS.paged_attention(qkv[:, :num_heads], cache, plan, scale, soft_cap)

    slots = contents(cache).float().view(-1, 2, num_kv_heads, head_dim)
    expected, row = [], 0
    for chunk in chunks:
        end = chunk.start + chunk.num_tokens
        k, v = slots[steps.slots(chunk.seq, 0, end)].unbind(1)
        q = qkv[row : row + chunk.num_tokens, :num_heads].float()
        positions = range(chunk.start, end)
        expected.append(naive_attention(q, k, v, positions, scale=scale, window=window, soft_cap=soft_cap))
        row += chunk.num_tokens
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), torch.cat(expected), rtol=0, atol=atol)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_mixed_step_at_every_head_dim(head_dim):
    check(MIXED, head_dim=head_dim)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1), (9, 3)])
def test_mixed_step_with_grouped_heads(heads):
    check(MIXED, heads=heads)


@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 128])
def test_mixed_step_at_every_block_size(block_size):
    check(MIXED, block_size=block_size)


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("window", [1, 5, 16, 40, 1000])
def test_sliding_window(window, block_size):
    check(MIXED, window=window, block_size=block_size)


@pytest.mark.parametrize("window", [None, 9])
def test_soft_cap(window):
    check(MIXED, soft_cap=0.8, window=window)


def test_bf16():
    check(MIXED, dtype=torch.bfloat16, atol=3e-2)


@pytest.mark.parametrize("soft_cap", [None, 0.8])
@pytest.mark.parametrize("window", [None, 9])
def test_int8(window, soft_cap):
    check(MIXED, cache_dtype=torch.int8, window=window, soft_cap=soft_cap)


def test_int8_with_queries_in_bf16():
    check(MIXED, cache_dtype=torch.int8, dtype=torch.bfloat16, atol=3e-2)


@pytest.mark.parametrize("chunks", [[Chunk(0, 0, 1)], [Chunk(1, 31, 1)], [Chunk(2, 16, 1)]])
def test_one_decode(chunks):
    check(chunks)


def test_decodes_of_equal_length_need_no_mask():
    chunks = [Chunk(seq, 36, 1) for seq in range(4)]
    plan = KERNELS.plan_attention(PagedSteps(6, max_len=64, block_size=16).metadata(chunks), dtype=torch.float32)
    assert [group.mask for group in plan.decode_groups] == [None]
    check(chunks)


def test_decodes_of_unlike_length_are_not_padded_to_the_longest():
    chunks = [Chunk(0, 9, 1), Chunk(1, 150, 1), Chunk(2, 140, 1), Chunk(3, 12, 1)]
    plan = KERNELS.plan_attention(PagedSteps(6, max_len=160, block_size=16).metadata(chunks), dtype=torch.float32)
    assert [tuple(group.block_ids.shape) for group in plan.decode_groups] == [(2, 10), (2, 1)]
    check(chunks)


@pytest.mark.parametrize("length", [127, 128, 129, 160])
def test_prompts_around_a_tile(length):
    check([Chunk(0, 0, length)])
    check([Chunk(0, 0, length)], window=30)


def test_random_steps():
    rng = random.Random(1)
    for _ in range(40):
        sizes = sorted(rng.choice((1, 1, 1, rng.randint(2, 40))) for _ in range(rng.randint(1, 6)))
        chunks = [Chunk(seq, rng.choice((0, 3, rng.randint(0, 119))), size) for seq, size in enumerate(sizes)]
        check(chunks, block_size=rng.choice((4, 16)), window=rng.choice((None, None, rng.randint(1, 60))))


def test_stale_values_of_other_sequences_do_not_leak():
    steps = PagedSteps(2, max_len=32, block_size=16)
    chunks = [Chunk(0, 2, 1), Chunk(1, 20, 1)]
    plan = KERNELS.plan_attention(steps.metadata(chunks), dtype=torch.float32)
    cache, q = layer_cache(torch.randn(steps.num_blocks, 16, 2, 1, 32)), torch.randn(2, 2, 32)
    expected = KERNELS.paged_attention(q, cache, plan, 0.2)
    own = [slot for chunk in chunks for slot in steps.slots(chunk.seq, 0, chunk.start + 1)]
    stale = torch.ones(steps.num_blocks * 16, dtype=torch.bool)
    stale[own] = False
    cache.values.view(-1, 2, 1, 32)[stale] = 1e4
    torch.testing.assert_close(KERNELS.paged_attention(q, cache, plan, 0.2), expected)
