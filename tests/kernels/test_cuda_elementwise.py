"""Norms, SiLU-and-multiply, rotary embedding and the KV store in the Triton language against float32 torch."""

from __future__ import annotations

import pytest
import torch

from tests.fakes.layer_caches import contents
from tests.kernels.cuda_cases import DEVICE, DTYPES, INTERPRETED, PDL, assert_close, poisoned, random_tensor
from trident_llm.kernels import reference
from trident_llm.kernels.layer_cache import SCALED_LIMITS, LayerCache, check_layer_cache
from trident_llm.kernels.rms_norm import rms_norm
from trident_llm.kernels.rotary_store import rotary_embed_and_store_kv
from trident_llm.kernels.silu_and_mul import silu_and_mul

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (5, 4096), (7, 3, 64)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random_tensor(*shape, dtype=dtype), random_tensor(shape[-1], dtype=dtype, seed=1)
    out = poisoned(*shape, dtype=dtype)
    rms_norm(x, weight, 1e-5, out, pdl=PDL)
    assert_close(out, torch.rms_norm(x.float(), weight.shape, weight.float(), 1e-5))


def test_rms_norm_of_heads_inside_a_wider_projection() -> None:
    qkv, weight = random_tensor(5, 8, 64), random_tensor(64, seed=1)
    heads = qkv[:, 2:5]
    out = poisoned(5, 3, 64, dtype=torch.float32)
    rms_norm(heads, weight, 1e-6, out, pdl=PDL)
    assert_close(out, torch.rms_norm(heads, weight.shape, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4096), (6, 576)])
def test_fused_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = random_tensor(*shape, dtype=dtype), random_tensor(*shape, dtype=dtype, seed=1)
    weight = random_tensor(shape[1], dtype=dtype, seed=2)
    total = (x.float() + residual.float()).to(dtype)
    out = poisoned(*shape, dtype=dtype)
    rms_norm(x, weight, 1e-5, out, residual=residual, pdl=PDL)
    assert torch.equal(residual, total)
    assert_close(out, torch.rms_norm(total.float(), weight.shape, weight.float(), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1536), (9, 1100)])
def test_silu_and_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, size = shape
    gate_up = random_tensor(rows, 2 * size, dtype=dtype, scale=3.0)
    out = poisoned(rows, size, dtype=dtype)
    silu_and_mul(gate_up, out, pdl=PDL)
    gate, up = gate_up.float().chunk(2, -1)
    assert_close(out, torch.nn.functional.silu(gate) * up)


def angles(num_tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, 1, D], the first half of sin negated."""
    angle = random_tensor(num_tokens, 1, head_dim // 2, seed=5, scale=3.0)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 64), (4, 4, 80), (3, 1, 96)])
def test_rotary_and_store(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    slots = torch.tensor([9, -1, 3, 0, 17], device=DEVICE)
    qkv = random_tensor(5, heads + 2 * kv_heads, head_dim, dtype=dtype)
    cos, sin = angles(5, head_dim, dtype)
    cache = random_tensor(5, 4, 2, kv_heads, head_dim, dtype=dtype, seed=3)

    expected = qkv.float()
    turned = expected[:, : heads + kv_heads]
    turned.copy_(turned * cos.float() + turned.roll(head_dim // 2, -1) * sin.float())
    expected_cache = cache.float().view(-1, 2 * kv_heads, head_dim)
    kept = slots >= 0
    expected_cache[slots[kept]] = expected[kept, heads:]

    before = cache.clone().view(-1, 2 * kv_heads, head_dim)
    rotary_embed_and_store_kv(qkv, cos, sin, LayerCache(cache), slots, pdl=PDL)
    assert_close(qkv, expected)
    rows = cache.view(-1, 2 * kv_heads, head_dim)
    assert_close(rows, expected_cache)
    untouched = torch.ones(20, dtype=torch.bool, device=DEVICE)
    untouched[slots[kept]] = False
    assert torch.equal(rows[untouched], before[untouched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", SCALED_LIMITS, ids=str)
def test_8_bit_store_scales_each_head_of_each_token(cache_dtype: torch.dtype, dtype: torch.dtype) -> None:
    sizes = torch.tensor([1e-3, 1.0, 50.0, 0.0], dtype=dtype, device=DEVICE)
    qkv = random_tensor(4, 8, 64, dtype=dtype) * sizes[:, None, None]
    cos, sin = angles(4, 64, dtype)
    shape = (2, 4, 2, 2, 64)
    cache = LayerCache(torch.zeros(shape, dtype=cache_dtype, device=DEVICE), torch.zeros(shape[:-1], device=DEVICE))
    slots = torch.tensor([5, 0, 2, -1], device=DEVICE)
    rotary_embed_and_store_kv(qkv, cos, sin, cache, slots, pdl=PDL)
    stored = contents(cache).view(8, 4, 64)
    steps = cache.scales.view(8, 4, 1)
    for token, slot in enumerate(slots[:3]):
        expected = qkv[token, 4:].double()
        if cache_dtype == torch.int8:
            assert ((stored[slot] - expected).abs() <= 0.5001 * steps[slot]).all()
        else:
            # The interpreter cuts a value to fp8 where the GPU rounds it.
            assert_close(stored[slot], expected, 0.07 if INTERPRETED else 0.03)
    largest = cache.values.float().abs().amax(-1).view(8, 4)
    assert largest[slots[:3]].eq(SCALED_LIMITS[cache_dtype]).all()
    untouched = [1, 3, 4, 6, 7]
    assert largest[untouched].eq(0).all() and steps[untouched].eq(0).all()


@pytest.mark.parametrize("cache_dtype", SCALED_LIMITS, ids=str)
def test_8_bit_store_of_zeros_gives_zeros(cache_dtype: torch.dtype) -> None:
    ones = torch.ones(1, 4, 2, 1, 64, device=DEVICE)
    cache = LayerCache(ones.to(cache_dtype), ones[..., 0].contiguous())
    qkv, slots = torch.zeros(4, 3, 64, device=DEVICE), torch.arange(4, device=DEVICE)
    rotary_embed_and_store_kv(qkv, *angles(4, 64, torch.float32), cache, slots, pdl=PDL)
    assert contents(cache).eq(0).all()
    assert cache.scales.isfinite().all()


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
def test_reference_twin_agrees_on_float32(cache_dtype: torch.dtype) -> None:
    """The same in-place calls through both implementations."""
    qkv = random_tensor(4, 6, 32)
    cos, sin = angles(4, 32, torch.float32)
    scales = [torch.zeros(2, 4, 2, 1, device=DEVICE) if cache_dtype == torch.int8 else None for _ in range(2)]
    caches = [LayerCache(torch.zeros(2, 4, 2, 1, 32, dtype=cache_dtype, device=DEVICE), s) for s in scales]
    slots = torch.tensor([1, 7, 2, 4], device=DEVICE)
    twin = qkv.clone()
    plan = reference.AttentionPlan(slots, None, (), (), None)
    reference.rotary_embed_and_store_kv(twin, cos, sin, caches[0], plan)
    rotary_embed_and_store_kv(qkv, cos, sin, caches[1], slots, pdl=PDL)
    assert_close(qkv, twin)
    if cache_dtype == torch.int8:
        assert_close(caches[1].scales, caches[0].scales)
        # A quotient that both round at the very middle may fall to either side.
        assert (caches[1].values.int() - caches[0].values.int()).abs().max() <= 1
    assert_close(contents(caches[1]), contents(caches[0]), 1e-3 if cache_dtype == torch.int8 else 2e-6)


def test_values_and_scales_must_fit_together() -> None:
    values, scales = torch.zeros(2, 4, 2, 1, 32, dtype=torch.int8), torch.zeros(2, 4, 2, 1)
    check_layer_cache(LayerCache(values, scales), 32)
    for cache, message in [
        (LayerCache(values), "int8 need scales"),
        (LayerCache(values.float(), scales), "float32 take no scales"),
        (LayerCache(values, scales[:, :, :1]), r"scales is \(2, 4, 1, 1\); expected \(2, 4, 2, 1\)"),
        (LayerCache(values, scales.half()), "float16"),
        (LayerCache(values.to(torch.int16), scales), "int16"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            check_layer_cache(cache, 32)
