"""QuantizedRows: activations in 8 bits with a scale per row, as linear layers of ``PackedBytes`` read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_dtype, check_last_contiguous, check_shape
from .layer_cache import SCALED_LIMITS
from .packed_bytes import BLOCK


@dataclass(frozen=True)
class QuantizedRows:
    values: Tensor
    """[T, in padded to whole blocks] int8 or float8_e4m3fn, columns in the order of ``PackedBytes``; zeros beyond the
    last."""
    scales: Tensor
    """[T] float32."""
    dtype: torch.dtype
    """What they were rounded to before they came to 8 bits, and what a product with them is."""

    @property
    def shape(self) -> torch.Size:
        """[T, in padded to whole blocks]."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def limit(self) -> float:
        """What the largest number of a row is stored as."""
        return SCALED_LIMITS[self.values.dtype]


Rows = Tensor | QuantizedRows
"""Activations [T, in] as linear layers take them."""


def allocate_rows(
    num_rows: int, num_inputs: int, codes: torch.dtype, *, dtype: torch.dtype, device: torch.device
) -> QuantizedRows:
    """Rows to be written, of values of dtype ``codes``."""
    return QuantizedRows(
        values=torch.empty(num_rows, padded_inputs(num_inputs), dtype=codes, device=device),
        scales=torch.empty(num_rows, dtype=torch.float32, device=device),
        dtype=dtype,
    )


def padded_inputs(num_inputs: int) -> int:
    return -(-num_inputs // BLOCK) * BLOCK


def check_rows(name: str, rows: QuantizedRows, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise TypeError or ValueError unless ``rows`` has room for values [T, in] of ``dtype``."""
    num_rows, num_inputs = shape
    check_dtype(name, rows.values, tuple(SCALED_LIMITS))
    check_shape(name, rows.values, (num_rows, padded_inputs(num_inputs)))
    check_last_contiguous(name, rows.values, 2)
    check_shape(f"scales of {name}", rows.scales, (num_rows,))
    if rows.dtype != dtype:
        raise TypeError(f"{name} is of {rows.dtype}; expected {dtype}")
