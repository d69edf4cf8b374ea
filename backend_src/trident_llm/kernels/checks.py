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


def check_product(out: Tensor, num_rows: int, *, num_splits: int, has_bias: bool, silu_and_mul: bool) -> None:
    """Raise ValueError unless out fits a product of ``num_rows`` rows, and what is asked for goes together."""
    if num_splits == 1:
        check_shape("out", out, (num_rows, -1))
    else:
        check_shape("out", out, (num_splits, num_rows, -1))
        check_dtype("out", out, (torch.float32,))
    if has_bias and (silu_and_mul or num_splits > 1):
        raise ValueError("a bias goes with neither silu_and_mul nor splits")
    if silu_and_mul and num_splits > 1:
        raise ValueError("silu_and_mul takes no splits")


def check_last_contiguous(name: str, tensor: Tensor, dims: int = 1) -> None:
    """Raise ValueError unless the last ``dims`` dimensions lie in memory without gaps."""
    expected = 1
    for dim in range(tensor.dim() - 1, tensor.dim() - 1 - dims, -1):
        if tensor.shape[dim] > 1 and tensor.stride(dim) != expected:
            raise ValueError(f"{name} has strides {tensor.stride()}; its last {dims} dimensions must be contiguous")
        expected *= tensor.shape[dim]
