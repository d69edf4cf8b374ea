"""Products with quantized weights on a CPU: torch's own operators where they are faster, else dequantization in tiles.

Rows decide: an operator that reads packed integers moves a quarter or half of the bytes, but computes in float32, so
that from a few dozen rows on a multiplication with dequantized tiles overtakes it.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer_cache import SCALED_LIMITS
from .nibble_panels import pack_panels
from .quantized_weight import Activations, QuantizedWeight

_INT8_OPERATOR_ROWS = 20
"""Up to so many rows the 8-bit operator is faster than a multiplication with the weight in bf16."""
_TILE_ELEMENTS = 1 << 20
"""Weights that are dequantized at once."""
_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


class PackedMatrix(Protocol):
    """A weight [out, in] in memory, without what is done to x before and after."""

    @property
    def nbytes(self) -> int: ...

    def multiply(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out], in x's dtype."""
        ...


@dataclass(frozen=True)
class PackedWeight:
    """What ``pack`` makes of a QuantizedWeight."""

    matrix: PackedMatrix
    activations: Activations
    input_order: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes + (0 if self.input_order is None else self.input_order.nbytes)


def pack(weight: QuantizedWeight) -> PackedWeight:
    return PackedWeight(_matrix(weight), weight.activations, weight.input_order)


def _matrix(weight: QuantizedWeight) -> PackedMatrix:
    if weight.activations == "fp8":
        return Float8Matrix(weight.codes, weight.scales.float(), weight.group_size)
    symmetric_rows = (
        weight.bits == 8 and weight.group_size == weight.shape[1] and bool((weight.zero_points == 128).all())
    )
    if not symmetric_rows:
        return pack_panels(weight)
    codes = (weight.codes ^ 128).view(torch.int8)
    if weight.activations == "int8" and _ONEDNN:
        return OneDnnMatrix.of(codes, weight.scales)
    return Int8Matrix(codes, weight.scales.float())


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """x [T, in] times the weight -> [T, out]."""
    if weight.input_order is not None:
        x = x.index_select(1, weight.input_order)
    if weight.activations == "none" or not x.shape[0]:
        return weight.matrix.multiply(x)
    codes, scales = quantize_tokens(x, weight.activations)
    # Codes are exact in x's dtype, and so is the product's order of magnitude: the scales come last.
    return weight.matrix.multiply(codes.to(x.dtype)).mul_(scales)


def quantize_tokens(x: Tensor, kind: Activations) -> tuple[Tensor, Tensor]:
    """x [T, in] as whole numbers from -127 to 127, or as values of float8_e4m3fn, in float32, and a scale per token
    [T, 1]. Symmetric: the largest magnitude of a token becomes the limit."""
    limit = SCALED_LIMITS[torch.int8 if kind == "int8" else torch.float8_e4m3fn]
    x = x.float()
    scales = x.abs().amax(1, keepdim=True).clamp_min_(1e-12).div_(limit)
    codes = x / scales
    if kind == "int8":
        return codes.round_(), scales
    return codes.clamp_(-limit, limit).to(torch.float8_e4m3fn).float(), scales


@dataclass(frozen=True)
class Int8Matrix:
    """8 bits, symmetric, one scale per output."""

    codes: Tensor
    """[out, in] int8."""
    scales: Tensor
    """[out, 1] float32."""

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16 and x.shape[0] <= _INT8_OPERATOR_ROWS:
            scales = self.scales.view(-1).to(x.dtype)
            return torch.ops.aten._weight_int8pack_mm.default(x.contiguous(), self.codes, scales)
        parts = [F.linear(x, codes.to(x.dtype)) for codes in _row_tiles(self.codes)]
        return _joined(parts).mul_(self.scales.view(-1))


@dataclass(frozen=True)
class OneDnnMatrix:
    """8 bits, symmetric, one scale per output, packed by oneDNN; x are whole numbers from -127 to 127."""

    codes: Tensor
    scales: Tensor
    """[out] float32."""
    zero_points: Tensor
    """[out] int32 zeros."""
    num_bytes: int

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor) -> OneDnnMatrix:
        """codes: [out, in] int8; scales: [out, 1]."""
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        zero_points = torch.zeros(codes.shape[0], dtype=torch.int32)
        return cls(packed, scales.float().reshape(-1), zero_points, codes.nbytes)

    @property
    def nbytes(self) -> int:
        return self.num_bytes + self.scales.nbytes + self.zero_points.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        # oneDNN is fast at unsigned inputs alone; the zero point takes the shift back.
        shifted = (x + 128).to(torch.uint8)
        return torch.ops.onednn.qlinear_pointwise.default(
            shifted, 1.0, 128, self.codes, self.scales, self.zero_points, None, 1.0, 0, x.dtype, "none", [], ""
        )


@dataclass(frozen=True)
class Float8Matrix:
    """float8_e4m3fn with scales per group: dequantized in tiles, whatever the rows."""

    codes: Tensor
    """[out, in] float8_e4m3fn."""
    scales: Tensor
    """[out, in / group_size] float32."""
    group_size: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        parts = []
        for codes, scales in zip(_row_tiles(self.codes), _row_tiles(self.scales, like=self.codes), strict=True):
            values = codes.float().view(codes.shape[0], -1, self.group_size).mul_(scales[..., None])
            parts.append(F.linear(x, values.view(codes.shape).to(x.dtype)))
        return _joined(parts)


def _row_tiles(rows: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """``rows`` cut where a matrix ``like`` is cut into tiles."""
    return rows.split(max(_TILE_ELEMENTS // (rows if like is None else like).shape[1], 1))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
