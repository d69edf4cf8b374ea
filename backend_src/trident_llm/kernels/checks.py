"""What a launcher checks before it hands pointers to a kernel. Knows tensors only."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_DTYPES = (torch.bfloat16, torch.float16)
FLOAT_DTYPES = (*HALF_DTYPES, torch.float32)


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
