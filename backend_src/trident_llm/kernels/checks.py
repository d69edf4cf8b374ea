"""What a launcher checks before it hands pointers to a kernel. Knows tensors only."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_DTYPES = (torch.bfloat16, torch.float16)
FLOAT_DTYPES = (*HALF_DTYPES, torch.float32)
FP8_MAX = 448.0
"""Largest finite value of float8 e4m3."""


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless ``tensor`` has one of the allowed dtypes."""
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, allowed))}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``tensor`` has this shape; -1 stands for any size."""
    fits = tensor.dim() == len(shape) and all(want in (-1, n) for want, n in zip(shape, tensor.shape, strict=True))
    if not fits:
        raise ValueError(f"{name} is {tuple(tensor.shape)}; expected {shape}")


def check_last_contiguous(name: str, tensor: Tensor, dims: int = 1) -> None:
    """Raise ValueError unless the last ``dims`` dimensions lie in memory without gaps."""
    expected = 1
    for dim in range(tensor.dim() - 1, tensor.dim() - 1 - dims, -1):
        if tensor.shape[dim] > 1 and tensor.stride(dim) != expected:
            raise ValueError(f"{name} has strides {tensor.stride()}; its last {dims} dimensions must be contiguous")
        expected *= tensor.shape[dim]


def check_kv_cache(kv_cache: Tensor, kv_scales: Tensor | None) -> None:
    """A layer's pool [num_blocks, block_size, 2, Hkv, D], and the scales [num_blocks, block_size, 2, Hkv] of fp8."""
    check_shape("kv_cache", kv_cache, (-1, -1, 2, -1, -1))
    check_last_contiguous("kv_cache", kv_cache, 4)
    check_dtype("kv_cache", kv_cache, (*FLOAT_DTYPES, torch.float8_e4m3fn))
    if (kv_cache.dtype == torch.float8_e4m3fn) != (kv_scales is not None):
        raise ValueError("an fp8 kv_cache and kv_scales go together: neither can stand alone")
    if kv_scales is not None:
        check_shape("kv_scales", kv_scales, tuple(kv_cache.shape[:-1]))
        check_dtype("kv_scales", kv_scales, (torch.float32,))
        check_last_contiguous("kv_scales", kv_scales, 4)
