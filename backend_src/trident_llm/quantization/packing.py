"""Codes of 4, 5, 6 or 8 bits as bytes without gaps, for files: the layout of a file, not of any kernel."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_BITS = 4


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [...] uint8 below 2**bits -> [bytes] uint8: pairs of low halves, then a plane for each bit above four."""
    flat = codes.flatten()
    if bits == 8:
        return flat
    parts = [_pack_fields(flat & 15, _LOW_BITS)]
    parts += [_pack_fields(flat >> plane & 1, 1) for plane in range(_LOW_BITS, bits)]
    return torch.cat(parts)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes that ``pack`` made ``packed`` of."""
    count = torch.Size(shape).numel()
    if bits == 8:
        return packed.view(shape)
    num_low = -(-count // 2)
    codes = _unpack_fields(packed[:num_low], _LOW_BITS, count)
    for plane, part in enumerate(packed[num_low:].view(bits - _LOW_BITS, -1), _LOW_BITS) if bits > _LOW_BITS else ():
        codes |= _unpack_fields(part, 1, count) << plane
    return codes.view(shape)


def _pack_fields(values: Tensor, width: int) -> Tensor:
    """values [N] below 2**width -> [ceil(N * width / 8)], the first in the lowest bits."""
    per_byte = 8 // width
    padded = torch.cat((values, values.new_zeros(-values.numel() % per_byte))).view(-1, per_byte)
    packed = padded[:, 0].clone()
    for index in range(1, per_byte):
        packed |= padded[:, index] << (index * width)
    return packed


def _unpack_fields(packed: Tensor, width: int, count: int) -> Tensor:
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] >> shifts & (2**width - 1)).flatten()[:count].contiguous()
