"""Layer caches with given contents, in any dtype, and what they hold."""

from __future__ import annotations

import torch

from trident_llm.kernels.layer_cache import SCALED_LIMITS, LayerCache


def layer_cache(values: torch.Tensor, dtype: torch.dtype | None = None) -> LayerCache:
    """values [num_blocks, block_size, 2, Hkv, D] in ``dtype``, rounded to nearest; None: as they are."""
    if dtype not in SCALED_LIMITS:
        return LayerCache(values if dtype is None else values.to(dtype))
    scales = values.float().abs().amax(-1).clamp(min=1e-12) / SCALED_LIMITS[dtype]
    quotients = values.float() / scales[..., None]
    return LayerCache((quotients.round() if dtype == torch.int8 else quotients).to(dtype), scales)


def contents(cache: LayerCache) -> torch.Tensor:
    """What the cache holds, [num_blocks, block_size, 2, Hkv, D] float64."""
    values = cache.values.double()
    return values if cache.scales is None else values * cache.scales[..., None].double()
