"""Tiles in shared memory, as kernels handle them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from .machine import machine
from .races import Memory, Region
from .values import Tile, gluon_dtype, plain


class SharedTile:
    """A part of shared memory. Rows lie as the swizzle has them: their first 128 bytes, then the next of all rows."""

    def __init__(self, memory: Memory, start: int, shape: list[int], layout: Any, *, is_transposed: bool = False):
        self._memory = memory
        self._start = start
        self._shape = shape
        self.layout = layout
        self._is_transposed = is_transposed

    @classmethod
    def allocate(cls, dtype: torch.dtype, shape: list[int], layout: Any) -> SharedTile:
        """Memory that holds what must not be read."""
        values = torch.full((math.prod(shape),), float("nan") if dtype.is_floating_point else 0x55, dtype=dtype)
        return cls(Memory(values), 0, list(shape), layout)

    @property
    def shape(self) -> list[int]:
        return self._shape[::-1] if self._is_transposed else self._shape

    @property
    def dtype(self) -> gl.dtype:
        return gluon_dtype(self._memory.values.dtype)

    @property
    def region(self) -> Region:
        return Region(self._memory, self._start, self._start + math.prod(self._shape))

    def index(self, index: Any) -> SharedTile:
        place = int(plain(index))
        assert 0 <= place < self._shape[0], f"index {place} of {self._shape[0]}"
        shape = self._shape[1:]
        return SharedTile(self._memory, self._start + place * math.prod(shape), shape, self.layout)

    def permute(self, order: tuple[int, ...]) -> SharedTile:
        assert tuple(order) == (1, 0), order
        return SharedTile(self._memory, self._start, self._shape, self.layout, is_transposed=not self._is_transposed)

    def _reinterpret(self, dtype: gl.dtype, shape: list[int], layout: Any) -> SharedTile:
        assert dtype == self.dtype and math.prod(shape) == math.prod(self._shape), (shape, self._shape)
        return SharedTile(self._memory, self._start, list(shape), layout)

    def load(self, layout: Any) -> Tile:
        machine().load(self.region)
        return Tile(self.read().clone(), layout)

    def store(self, tile: Tile) -> None:
        machine().store(self.region, changes=not torch.equal(self.read(), tile.value))
        self.write(tile.value)

    def read(self) -> Tensor:
        """What lies here now."""
        values = self._rows().transpose(0, 1).reshape(self._shape)
        return values.T if self._is_transposed else values

    def write(self, values: Tensor) -> None:
        rows = self._rows()
        rows.copy_(values.reshape(rows.shape[1], rows.shape[0], rows.shape[2]).transpose(0, 1))

    def _rows(self) -> Tensor:
        """[chunks of a row, rows, elements of a chunk] of memory."""
        chunk = self.layout.swizzle_byte_width * 8 // self.layout.element_bitwidth
        return self.region.values.view(self._shape[-1] // chunk, -1, chunk)
