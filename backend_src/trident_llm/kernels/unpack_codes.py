"""Device functions that turn words of a PackedWeight into numbers of x's dtype, two at a time.

The codes are set into the mantissa of a power of two (128 in bfloat16, 1024 in float16), from which a subtraction
makes the exact difference to the zero point. Kim et al. 2022, "Who Says Elephants Can't Run", describe the trick.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def unpack_text(bits: int, value: int, is_float16: bool, is_scaled: bool = False) -> str:
    """PTX for value number ``value`` of two words $1: code minus zero point, two numbers, to $0.

    $2: what ``offset_of`` gives, twice. Then, if is_scaled, what the numbers are multiplied with, twice; then, with 5
    and 6 bits, words of the second plane, shifted down to that value.
    """
    kind = "f16x2" if is_float16 else "bf16x2"
    magic = "0x64006400" if is_float16 else "0x43004300"
    lines = ["{ .reg .b32 t, h, c;"]
    shift = value * (8 if bits == 8 else 4)
    lines.append(f"shr.u32 t, $1, {shift};" if shift else "mov.b32 t, $1;")
    if bits != 8:
        lines.append(f"lop3.b32 t, t, 0x000F000F, {magic}, 0xEA;")
    elif is_float16:
        lines.append(f"lop3.b32 t, t, 0x00FF00FF, {magic}, 0xEA;")
    else:
        # bfloat16 has room for seven bits beside the power of two: the eighth is added as 64 times 2.0 or 0.
        lines.append("and.b32 h, t, 0x00800080; shl.b32 h, h, 7;")
        lines.append(f"lop3.b32 t, t, 0x007F007F, {magic}, 0xEA; mov.b32 c, {magic}; sub.rn.bf16x2 t, t, c;")
        lines.append("mov.b32 c, 0x42804280; fma.rn.bf16x2 t, h, c, t;")
    if bits in (5, 6):
        plane, mask = ("$4" if is_scaled else "$3"), ("0x00010001" if bits == 5 else "0x00030003")
        lines.append(f"and.b32 h, {plane}, {mask}; shl.b32 h, h, 4; or.b32 t, t, h;")
    if is_scaled:
        lines.append(f"sub.rn.{kind} t, t, $2; mul.rn.{kind} $0, t, $3; }}")
    else:
        lines.append(f"sub.rn.{kind} $0, t, $2; }}")
    return " ".join(lines)


@triton.constexpr_function
def byte_text(value: int, is_int8: bool, is_float16: bool) -> str:
    """PTX for byte number ``value`` of two words $1 of ``PackedBytes``: two numbers to $0, exact."""
    lines = ["{ .reg .b32 t, h, c;", "shr.u32 t, $1, 8;" if value else "mov.b32 t, $1;"]
    if is_int8 and is_float16:
        lines.append("xor.b32 t, t, 0x00800080; lop3.b32 t, t, 0x00FF00FF, 0x64006400, 0xEA;")
        lines.append("mov.b32 c, 0x64806480; sub.rn.f16x2 $0, t, c; }")
    elif is_int8:
        # Seven bits beside 128; the sign takes away 64 times 2.0 or 0.
        lines.append("and.b32 h, t, 0x00800080; shl.b32 h, h, 7; lop3.b32 t, t, 0x007F007F, 0x43004300, 0xEA;")
        lines.append("mov.b32 c, 0x43004300; sub.rn.bf16x2 t, t, c; mov.b32 c, 0xC280C280;")
        lines.append("fma.rn.bf16x2 $0, h, c, t; }")
    else:
        # An e4m3 number's bits are those of a wider one whose exponent has another bias: a product sets it right.
        shift, factor, kind = (7, "0x5C005C00", "f16x2") if is_float16 else (4, "0x7B807B80", "bf16x2")
        lines.append(f"and.b32 h, t, 0x00800080; shl.b32 h, h, 8; and.b32 t, t, 0x007F007F; shl.b32 t, t, {shift};")
        lines.append(f"or.b32 t, t, h; mov.b32 c, {factor}; mul.rn.{kind} $0, t, c; }}")
    return " ".join(lines)


@triton.constexpr_function
def offset_base(bits: int, is_float16: bool) -> int:
    """What the zero point is added to, to be subtracted from a number made of a code."""
    if is_float16:
        return 1024
    return 0 if bits == 8 else 128


@triton.jit
def scales_of(scales_and_zeros):
    """float16 scales in the low halves, as float32."""
    return (scales_and_zeros & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def unpack(
    low, high, scales_and_zeros, VALUE: tl.constexpr, SHIFT, BITS: tl.constexpr, SCALED: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Code minus zero point of one value of each word [outputs, words], exact in DTYPE; times the scale if SCALED.

    high: the second plane's words, of which SHIFT bits are to be dropped (5 and 6 bits). scales_and_zeros: [outputs].
    """
    zeros = scales_and_zeros >> 16
    if not ASM:
        if BITS == 8:
            codes = (low.to(tl.int32) >> (8 * VALUE)) & 255
        else:
            codes = (low.to(tl.int32) >> (4 * VALUE)) & 15
            if BITS > 4:
                codes |= ((high.to(tl.int32) >> SHIFT) & ((1 << (BITS - 4)) - 1)) << 4
        numbers = (codes - zeros[:, None]).to(DTYPE)
        if SCALED:
            numbers = (numbers * scales_of(scales_and_zeros).to(DTYPE)[:, None]).to(DTYPE)
        return numbers
    TEXT: tl.constexpr = unpack_text(BITS, VALUE, DTYPE.is_fp16(), SCALED)
    offsets = (zeros + offset_base(BITS, DTYPE.is_fp16())).to(DTYPE)
    offsets = tl.broadcast_to(offsets[:, None], low.shape)
    scales = tl.broadcast_to(scales_of(scales_and_zeros).to(DTYPE)[:, None], low.shape)
    if BITS == 5 or BITS == 6:
        plane = (high >> SHIFT).to(tl.int16)
        if SCALED:
            pair = tl.inline_asm_elementwise(
                TEXT, "=r,r,r,r,r", [low, offsets, scales, plane], dtype=tl.int16, is_pure=True, pack=2
            )
        else:
            pair = tl.inline_asm_elementwise(
                TEXT, "=r,r,r,r", [low, offsets, plane], dtype=tl.int16, is_pure=True, pack=2
            )
    elif SCALED:
        pair = tl.inline_asm_elementwise(TEXT, "=r,r,r,r", [low, offsets, scales], dtype=tl.int16, is_pure=True, pack=2)
    else:
        pair = tl.inline_asm_elementwise(TEXT, "=r,r,r", [low, offsets], dtype=tl.int16, is_pure=True, pack=2)
    return pair.to(DTYPE, bitcast=True)
