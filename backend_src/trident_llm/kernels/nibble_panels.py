"""NibblePanels: integer weights of 4 to 8 bits on a CPU, as planes of 4 bits in the layout of torch's 4-bit operator.

One plane holds 4 bits; a second one, with 16 times the scale, the bits above them. The operator multiplies planes side
by side, with x repeated for each. Where it cannot be used, tiles of the same bytes are dequantized.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantized_weight import QuantizedWeight

_OPERATOR_GROUPS = (256, 128, 64, 32)
"""Group sizes that the operator reads."""
_OPERATOR_ROWS = {1: 64, 2: 32}
"""By number of planes: up to so many rows the operator is faster than dequantization."""
_TILE_PANELS, _TILE_ELEMENTS = 24, 1 << 22
"""Most panels, and about the most weights, that are dequantized for one multiplication."""
_CHUNK_ELEMENTS = 1 << 19
"""Weights that pass from integers to floats at once, in memory that a core's cache holds and every chunk reuses."""
_MIDDLE = 8
"""What the operator takes from every nibble."""


def _operator_panel() -> int | None:
    """Outputs in a panel of the operator's layout on this machine; None where it is another layout."""
    codes = torch.arange(128 * 8, dtype=torch.int32).mul_(7).remainder_(16).view(128, 8)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default(codes, 1).view(-1)
    for panel in (64, 32):
        if torch.equal(_pack_nibbles(codes.to(torch.uint8), panel).view(-1), packed):
            return panel
    return None


def _pack_nibbles(codes: Tensor, panel: int) -> Tensor:
    """codes [out, in] uint8 from 0 to 15 -> [out / panel, in, panel / 2] uint8: byte j of a panel's column holds output
    j in its low half and output j + panel / 2 in its high half."""
    halves = codes.view(-1, 2, panel // 2, codes.shape[1])
    return (halves[:, 0] | (halves[:, 1] << 4)).transpose(1, 2).contiguous()


_OPERATOR_PANEL = _operator_panel()
_PANEL = _OPERATOR_PANEL or 64


@dataclass
class NibblePanels:
    """w = the sum over planes p of scales[p] * (nibble[p] - zero_points[p]), a scale and a zero point per group."""

    nibbles: Tensor
    """[ceil(out / panel), planes * in, panel / 2] uint8, as ``_pack_nibbles`` has them, plane after plane."""
    scales_and_zeros: Tensor
    """[planes * groups, out padded to panels, 2], float16 or float32: scale and zero point. ``for_operator`` puts what
    the operator wants in its place: bfloat16 scales and offsets."""
    num_planes: int
    num_outputs: int
    num_inputs: int
    group_size: int

    @property
    def nbytes(self) -> int:
        return self.nibbles.nbytes + self.scales_and_zeros.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        if x.dtype == torch.bfloat16 and _OPERATOR_PANEL is not None and self.group_size in _OPERATOR_GROUPS:
            self._use_operator_scales()
            if 0 < x.shape[0] <= _OPERATOR_ROWS[self.num_planes]:
                return self._operator(x)
        return self._tiled(x)

    def _operator(self, x: Tensor) -> Tensor:
        x = x.contiguous() if self.num_planes == 1 else torch.cat([x] * self.num_planes, 1)
        bytes_by_output = self.nibbles.view(-1, self.num_planes * self.num_inputs // 2)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu.default(
            x, bytes_by_output, self.group_size, self.scales_and_zeros
        )
        return self._without_padding(y)

    def _without_padding(self, y: Tensor) -> Tensor:
        return y if y.shape[1] == self.num_outputs else y[:, : self.num_outputs].contiguous()

    def _use_operator_scales(self) -> None:
        """From scale and zero point to the operator's w = scale * (nibble - 8) + offset, in bfloat16.

        Done when x turns out to be bfloat16; other dtypes keep what is exact. The offsets of two planes meet the same
        sums of x, so the second takes what rounding leaves of the first.
        """
        if self.scales_and_zeros.dtype == torch.bfloat16:
            return
        scales, zeros = self.scales_and_zeros.float().unbind(-1)
        scales = scales.bfloat16().float()
        offsets = (_MIDDLE - zeros) * scales
        if self.num_planes == 2:
            total = offsets.chunk(2)[0] + offsets.chunk(2)[1]
            first = total.bfloat16().float()
            offsets = torch.cat((first, total - first))
        self.scales_and_zeros = torch.stack((scales, offsets), -1).bfloat16()

    def _tiled(self, x: Tensor) -> Tensor:
        """The product with one transposed tile of the weight after another."""
        num_panels = self.nibbles.shape[0]
        most = min(max(_TILE_ELEMENTS // (self.num_inputs * _PANEL), 1), _TILE_PANELS)
        num_tiles = -(-num_panels // most)
        bounds = [num_panels * tile // num_tiles for tile in range(num_tiles + 1)]
        y = x.new_empty(x.shape[0], num_panels * _PANEL)
        space = _Space.of(self, max(last - first for first, last in itertools.pairwise(bounds)), x.dtype)
        for first, last in itertools.pairwise(bounds):
            columns = slice(first * _PANEL, last * _PANEL)
            torch.mm(x, self._dequantized(first, last, space), out=y[:, columns])
        return self._without_padding(y)

    def _dequantized(self, first: int, last: int, space: _Space) -> Tensor:
        """Panels ``first`` to ``last`` as the transposed weight [in, outputs], in ``space``; computed in float32."""
        num_outputs = (last - first) * _PANEL
        tile = space.tile[: self.num_inputs * num_outputs].view(-1, self.group_size, num_outputs)
        scales, offsets = self._scales_and_offsets(first, last)
        for group in range(0, tile.shape[0], space.groups):
            chunk = tile[group : group + space.groups]
            rows = chunk.shape[0] * self.group_size
            codes = space.codes[: rows * num_outputs].view(rows, last - first, _PANEL)
            self._unpack(codes, first, last, group * self.group_size)
            values = space.values[: codes.numel()].view(chunk.shape)
            values.copy_(codes.view(chunk.shape))
            part = slice(group, group + space.groups)
            chunk.copy_(torch.addcmul(offsets[part], values, scales[part], out=values))
        return tile.view(self.num_inputs, num_outputs)

    def _unpack(self, codes: Tensor, first: int, last: int, first_input: int) -> None:
        """Write the codes of panels ``first`` to ``last`` to codes [inputs, panels, panel], from ``first_input`` on."""
        planes = self.nibbles[first:last].unflatten(1, (self.num_planes, self.num_inputs))
        planes = planes[:, :, first_input : first_input + codes.shape[0]]
        low_half, high_half = planes[:, 0] & 15, planes[:, 0] >> 4
        if self.num_planes == 2:
            low_half |= planes[:, 1] << 4
            high_half |= planes[:, 1] & 0xF0
        torch.cat((low_half.transpose(0, 1), high_half.transpose(0, 1)), -1, out=codes)

    def _scales_and_offsets(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """weight = scale * code + offset: both [groups, 1, outputs] float32."""
        planes = self.scales_and_zeros[:, first * _PANEL : last * _PANEL].float()
        planes = planes.view(self.num_planes, -1, 1, planes.shape[1], 2)
        scales, zeros = planes[0, ..., 0].contiguous(), planes[..., 1]
        if self.scales_and_zeros.dtype == torch.bfloat16:
            middle = _MIDDLE if self.num_planes == 1 else _MIDDLE * 17
            return scales, zeros.sum(0) - middle * scales
        zero_points = zeros[0] if self.num_planes == 1 else zeros[0] + 16 * zeros[1]
        return scales, -zero_points * scales


@dataclass(frozen=True)
class _Space:
    """Memory that all tiles of a multiplication share, flat."""

    tile: Tensor
    codes: Tensor
    """uint8, of a chunk."""
    values: Tensor
    """float32, of a chunk."""
    groups: int
    """In a chunk."""

    @classmethod
    def of(cls, weight: NibblePanels, panels: int, dtype: torch.dtype) -> _Space:
        group_elements = weight.group_size * panels * _PANEL
        groups = min(max(_CHUNK_ELEMENTS // group_elements, 1), weight.num_inputs // weight.group_size)
        return cls(
            tile=torch.empty(weight.num_inputs * panels * _PANEL, dtype=dtype),
            codes=torch.empty(groups * group_elements, dtype=torch.uint8),
            values=torch.empty(groups * group_elements),
            groups=groups,
        )


def pack_panels(weight: QuantizedWeight) -> NibblePanels:
    """Any integer weight; its input order and activations are the caller's."""
    num_outputs, num_inputs = weight.shape
    group_size = next((size for size in _OPERATOR_GROUPS if weight.group_size % size == 0), weight.group_size)
    padding = (0, 0, 0, -num_outputs % _PANEL)
    codes = F.pad(weight.codes, padding)
    scales, zero_points = (
        F.pad(values, padding).repeat_interleave(weight.group_size // group_size, 1)
        for values in (weight.scales, weight.zero_points)
    )
    num_planes = 1 if weight.bits == 4 else 2
    shifts = range(0, 4 * num_planes, 4)
    nibbles = torch.cat([_pack_nibbles((codes >> shift) & 15, _PANEL) for shift in shifts], 1)
    planes = [
        torch.stack((scales.float() * 2**shift, ((zero_points >> shift) & 15).float()), -1).transpose(0, 1)
        for shift in shifts
    ]
    scales_and_zeros = torch.cat(planes).contiguous()
    halves = scales_and_zeros.half()
    return NibblePanels(
        nibbles=nibbles,
        scales_and_zeros=halves if torch.equal(halves.float(), scales_and_zeros) else scales_and_zeros,
        num_planes=num_planes,
        num_outputs=num_outputs,
        num_inputs=num_inputs,
        group_size=group_size,
    )
