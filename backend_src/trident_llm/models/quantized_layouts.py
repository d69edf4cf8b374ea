"""From what AWQ, GPTQ and compressed-tensors store of a linear layer to a QuantizedWeight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoadFailed
from ..kernels.quantized_weight import QuantizedWeight
from .stored_quantization import WeightFormat

_WORD_BITS = 32
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which field of a word AutoAWQ's gemm layout keeps each of 8 neighbouring outputs."""


@dataclass(frozen=True)
class Parts:
    """What is stored of one linear layer."""

    main: Tensor
    others: Mapping[str, Tensor]
    shape: tuple[int, ...]
    """Outputs and inputs."""
    format: WeightFormat
    error: Callable[[str], LoadFailed]

    def other(self, leaf: str) -> Tensor:
        if leaf not in self.others:
            raise self.error(f"has no {leaf} beside it")
        return self.others[leaf]


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """words [..., C] int32 -> [..., C * fields] uint8, the lowest bits first; bits that fill no field are left."""
    fields = torch.arange(0, _WORD_BITS - bits + 1, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> fields) & (2**bits - 1)).to(torch.uint8).flatten(-2)


def words_of(count: int, bits: int) -> tuple[int, int]:
    """Words that ``count`` fields take: without gaps, and with no field in two words."""
    return -(-count * bits // _WORD_BITS), -(-count // (_WORD_BITS // bits))


def unpack_fields(words: Tensor, bits: int, count: int) -> Tensor:
    """words [..., C] int32 -> [..., count] uint8. compressed-tensors packs without gaps of late; before, and for 4
    and 8 bits in either case, no field lies in two words."""
    if _WORD_BITS % bits == 0 or words.shape[-1] != words_of(count, bits)[0]:
        return unpack_words(words, bits)[..., :count]
    starts = torch.arange(0, count * bits, bits, device=words.device)
    unsigned = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    places = starts // _WORD_BITS
    pairs = unsigned[..., places] | (unsigned[..., places + 1] << _WORD_BITS)
    return ((pairs >> (starts % _WORD_BITS)) & (2**bits - 1)).to(torch.uint8)


def pack_fields(codes: Tensor, bits: int) -> Tensor:
    """codes [R, C] uint8 below 2**bits -> [R, ceil(C * bits / 32)] int32 without gaps: what ``unpack_fields`` reads."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % _WORD_BITS)).unflatten(1, (-1, _WORD_BITS))
    words = torch.zeros(*padded.shape[:2], bits + 1, dtype=torch.int64, device=codes.device)
    for index in range(_WORD_BITS):
        word, place = divmod(index * bits, _WORD_BITS)
        shifted = padded[..., index].long() << place
        words[..., word] |= shifted & 0xFFFFFFFF
        words[..., word + 1] |= shifted >> _WORD_BITS
    flat = words[..., :bits].flatten(1)[:, : words_of(codes.shape[1], bits)[0]]
    return torch.where(flat >= 1 << (_WORD_BITS - 1), flat - (1 << _WORD_BITS), flat).to(torch.int32)


def read_awq(parts: Parts) -> QuantizedWeight:
    """qweight [in, out / 8] and qzeros [groups, out / 8] int32, scales [groups, out]."""
    codes, zero_points = (
        unpack_words(words, parts.format.bits).unflatten(-1, (-1, 8))[..., list(_AWQ_PLACES)].flatten(-2).t()
        for words in (parts.main, parts.other("qzeros"))
    )
    return _weight(parts, codes, parts.other("scales").t(), zero_points)


def read_gptq(parts: Parts) -> QuantizedWeight:
    """qweight [in * bits / 32, out], qzeros [groups, out * bits / 32] int32, scales [groups, out], g_idx [in] int32.

    The first version of the format stores zero points less one.
    """
    bits = parts.format.bits
    codes = unpack_words(parts.main.t(), bits)
    stored = unpack_words(parts.other("qzeros"), bits).t().to(torch.int16)
    zero_points = ((stored + parts.format.zero_offset) & (2**bits - 1)).to(torch.uint8)
    return _weight(parts, codes, parts.other("scales").t(), zero_points, parts.others.get("g_idx"))


def read_compressed(parts: Parts) -> QuantizedWeight | Tensor:
    """weight_packed [out, in * bits / 32] int32, or weight [out, in] int8 or float8_e4m3fn; weight_scale of one
    element, [out, 1] or [out, groups]; weight_zero_point like it, packed along outputs where the weight is.

    Codes and zero points are signed; packed ones have 2**(bits - 1) added. A float8 weight whose inputs stay as they
    are comes dequantized.
    """
    num_outputs, num_inputs = parts.shape
    scales = parts.other("weight_scale")
    scales = scales.reshape(1, 1).expand(num_outputs, 1) if scales.numel() == 1 else scales
    scales = scales[:, None] if scales.dim() == 1 else scales
    if parts.main.dtype == torch.float8_e4m3fn:
        weight = _weight(parts, parts.main, scales, torch.zeros(scales.shape, dtype=torch.uint8, device=scales.device))
        return weight if parts.format.activations == "fp8" else weight.dequantize()
    middle = 2 ** (parts.format.bits - 1)
    packed = parts.main.dtype == torch.int32
    if packed:
        stored_shape = parts.other("weight_shape").tolist()
        if stored_shape != [num_outputs, num_inputs]:
            raise parts.error(f"weight_shape is {stored_shape}; {[num_outputs, num_inputs]} was expected")
    bits = parts.format.bits
    codes = unpack_fields(parts.main, bits, num_inputs) if packed else (parts.main ^ -128).view(torch.uint8)
    zeros = parts.others.get("weight_zero_point")
    if zeros is None:
        zero_points = torch.full(scales.shape, middle, dtype=torch.uint8, device=scales.device)
    elif zeros.dtype == torch.int32:
        zero_points = unpack_fields(zeros.t(), bits, num_outputs).t()
    else:
        zeros = zeros.reshape(-1, 1) if zeros.dim() < 2 else zeros
        zero_points = (zeros.to(torch.int16) + middle).to(torch.uint8).expand(scales.shape)
    return _weight(parts, codes, scales, zero_points, parts.others.get("weight_g_idx"))


def _weight(
    parts: Parts, codes: Tensor, scales: Tensor, zero_points: Tensor, groups: Tensor | None = None
) -> QuantizedWeight:
    """groups: [in] integers, the group of each input; None where they follow one another."""
    num_outputs, num_inputs = parts.shape
    num_groups = scales.shape[-1]
    if scales.shape != (num_outputs, num_groups) or zero_points.shape != scales.shape or num_inputs % num_groups:
        raise parts.error(
            f"scales {list(scales.shape)} and zero points {list(zero_points.shape)}, outputs first, do not fit a "
            f"weight of {num_outputs} outputs and {num_inputs} inputs"
        )
    order = None if groups is None else _input_order(parts, groups.long(), num_groups)
    return QuantizedWeight(
        codes=(codes if order is None else codes[:, order]).contiguous(),
        scales=scales.contiguous(),
        zero_points=zero_points.contiguous(),
        bits=parts.format.bits,
        group_size=num_inputs // num_groups,
        activations=parts.format.activations if codes.dtype != torch.float8_e4m3fn else "fp8",
        input_order=order,
    )


def _input_order(parts: Parts, groups: Tensor, num_groups: int) -> Tensor | None:
    """The inputs group after group; None where they lie so already. An index of -1 throughout means the same."""
    num_inputs = parts.shape[1]
    size = num_inputs // num_groups
    in_turn = torch.arange(num_inputs, device=groups.device) // size
    if groups.shape != in_turn.shape:
        raise parts.error(f"the groups of {groups.numel()} inputs are stored; there are {num_inputs} inputs")
    if bool((groups == in_turn).all()) or bool((groups == -1).all()):
        return None
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], in_turn):
        raise parts.error(f"groups of unequal size are not supported; each of {num_groups} must have {size} inputs")
    return order
