"""LayerCache: one layer's K and V as all operators take them, in the model's dtype or in 8 bits with scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape

SCALED_LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The 8-bit dtypes, each with the number that the largest value of a token's K or V in a head is stored as."""


@dataclass(frozen=True)
class LayerCache:
    """K and V of one layer."""

    values: Tensor
    """[num_blocks, block_size, 2, Hkv, D], K at index 0 and V at index 1."""
    scales: Tensor | None = None
    """[num_blocks, block_size, 2, Hkv] float32: a stored number times its scale is the value. With 8 bits only."""


def check_layer_cache(cache: LayerCache, head_dim: int) -> None:
    """Raise TypeError or ValueError unless shapes, strides and dtypes are those that LayerCache promises."""
    values, scales = cache.values, cache.scales
    check_shape("values", values, (-1, -1, 2, -1, head_dim))
    check_last_contiguous("values", values, 4)
    check_dtype("values", values, (*FLOAT_DTYPES, *SCALED_LIMITS))
    if (values.dtype in SCALED_LIMITS) != (scales is not None):
        raise ValueError(f"values of {values.dtype} {'need scales' if scales is None else 'take no scales'}")
    if scales is not None:
        check_shape("scales", scales, tuple(values.shape[:-1]))
        check_dtype("scales", scales, (torch.float32,))
        check_last_contiguous("scales", scales, 4)
