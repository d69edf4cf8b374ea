"""The torch twins of norms, activation, linear layers and the rotary store, each against plain float32 torch."""

from __future__ import annotations

import pytest
import torch

from tests.fakes.layer_caches import contents
from tests.fakes.paged_steps import Chunk, PagedSteps
from trident_llm.kernels import kernels_for
from trident_llm.kernels.layer_cache import LayerCache

KERNELS = kernels_for(torch.device("cpu"))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def naive_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.float()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.float()


@DTYPES
@pytest.mark.parametrize("shape", [(1, 64), (7, 576), (3, 5, 32)])
def test_rms_norm(dtype, shape):
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)
    assert_near(KERNELS.rms_norm(x, weight, 1e-5), naive_rms_norm(x, weight, 1e-5), dtype)


def test_rms_norm_of_zeros_is_zero():
    assert KERNELS.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6).abs().max() == 0


@DTYPES
def test_fused_add_rms_norm_adds_in_place(dtype):
    x, residual, weight = (randn(5, 48, dtype=dtype, seed=s) for s in (0, 1, 2))
    total = (x.float() + residual.float()).to(dtype)
    normed = KERNELS.fused_add_rms_norm(x, residual, weight[0], 1e-5)
    assert torch.equal(residual, total)
    assert_near(normed, naive_rms_norm(total, weight[0], 1e-5), dtype)


@DTYPES
def test_silu_and_mul(dtype):
    gate_up = randn(6, 80, dtype=dtype)
    gate, up = gate_up.float().chunk(2, -1)
    assert_near(KERNELS.silu_and_mul(gate_up), gate * torch.sigmoid(gate) * up, dtype)


@DTYPES
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 33])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_on_packed_weights(dtype, num_tokens, with_bias):
    x, weight = randn(num_tokens, 48, dtype=dtype), randn(80, 48, dtype=dtype, seed=1) / 7
    bias = randn(80, dtype=dtype, seed=2) if with_bias else None
    expected = x.float() @ weight.float().T + (bias.float() if bias is not None else 0)
    assert_near(KERNELS.linear(x, KERNELS.pack_linear(weight), bias), expected, dtype)


def test_linear_reads_strided_rows():
    x, weight = randn(4, 96)[:, 16:64], randn(20, 48, seed=1)
    torch.testing.assert_close(KERNELS.linear(x, KERNELS.pack_linear(weight)), x @ weight.T)


def test_float16_weights_stay_as_they_are():
    weight = randn(8, 16, dtype=torch.float16)
    assert KERNELS.pack_linear(weight) is weight


def naive_rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x [T, H, D], angles [T, D / 2]: each pair (d, d + D/2) turned by its angle."""
    first, second = x.float().chunk(2, -1)
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@DTYPES
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 80), (4, 1, 32)])
def test_rotary_embed_and_store_kv(dtype, num_heads, num_kv_heads, head_dim):
    steps = PagedSteps(3, max_len=12, block_size=4)
    # Of sequence 1, whose slots are -1, nothing may be written.
    chunks = [Chunk(0, 9, 1), Chunk(1, 3, 4, stored=False), Chunk(2, 0, 6)]
    metadata = steps.metadata(chunks)
    num_tokens = len(metadata.slot_mapping)
    qkv = randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    angles = randn(num_tokens, head_dim // 2, seed=1)
    cos, sin = angles.cos().unsqueeze(1).to(dtype), angles.sin().unsqueeze(1).to(dtype)
    cache = randn(steps.num_blocks, 4, 2, num_kv_heads, head_dim, dtype=dtype, seed=2)
    before = cache.float().view(-1, 2, num_kv_heads, head_dim).clone()

    rotated = naive_rotate(qkv[:, : num_heads + num_kv_heads], angles)
    v = qkv[:, num_heads + num_kv_heads :].float().clone()
    plan = KERNELS.plan_attention(metadata, dtype=dtype)
    rows = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    KERNELS.rotary_embed_and_store_kv(qkv, *rows, LayerCache(cache), plan)

    assert_near(qkv[:, :num_heads], rotated[:, :num_heads], dtype)
    expected = before
    for token, slot in enumerate(metadata.slot_mapping.tolist()):
        if slot >= 0:
            expected[slot, 0], expected[slot, 1] = rotated[token, num_heads:], v[token]
    assert_near(cache.view(-1, 2, num_kv_heads, head_dim), expected, dtype)


@DTYPES
def test_int8_store_is_within_half_a_step_of_every_value(dtype):
    steps = PagedSteps(3, max_len=12, block_size=4)
    metadata = steps.metadata([Chunk(0, 9, 1), Chunk(1, 3, 4, stored=False), Chunk(2, 0, 6)])
    stored = metadata.slot_mapping >= 0
    slots = metadata.slot_mapping[stored]
    qkv = randn(len(stored), 10, 32, dtype=dtype) * torch.logspace(-3, 2, len(stored), dtype=dtype)[:, None, None]
    qkv[-1] = 0
    ones = torch.ones(steps.num_blocks, 4, 2, 3, 32)
    cache = LayerCache(ones.to(torch.int8), ones[..., 0].contiguous())
    angles = randn(len(stored), 1, 32, dtype=dtype, seed=1)
    KERNELS.rotary_embed_and_store_kv(qkv, angles, angles, cache, KERNELS.plan_attention(metadata, dtype=dtype))

    kept, scales = contents(cache).view(-1, 6, 32), cache.scales.view(-1, 6, 1)
    assert ((kept[slots] - qkv[stored, 4:].double()).abs() <= 0.5001 * scales[slots]).all()
    assert (cache.values.view(-1, 6, 32)[slots[:-1]].abs().amax(-1) == 127).all()
    assert (kept[slots[-1]] == 0).all() and scales.isfinite().all()
    untouched = torch.ones(len(kept), dtype=torch.bool)
    untouched[slots] = False
    assert (kept[untouched] == 1).all() and (scales[untouched] == 1).all()


def test_a_step_that_stores_nothing_leaves_the_cache_alone():
    steps = PagedSteps(1, max_len=8, block_size=4)
    plan = KERNELS.plan_attention(steps.metadata([Chunk(0, 2, 3, stored=False)]), dtype=torch.float32)
    cache = randn(steps.num_blocks, 4, 2, 1, 8)
    before = cache.clone()
    rows = torch.ones(3, 1, 8)
    KERNELS.rotary_embed_and_store_kv(randn(3, 4, 8), rows, rows, LayerCache(cache), plan)
    assert torch.equal(cache, before)
