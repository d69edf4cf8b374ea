"""silu(gate) * up for a merged projection, brought to 8 bits. A program holds a whole row, whose maximum it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape
from .packed_bytes import BLOCK
from .quantize_rows import SMALLEST, round_codes, row_scale
from .quantized_rows import QuantizedRows, allocate_rows
from .silu_and_mul import load_gated

MAX_SIZE = 32_768
"""Outputs that fit the registers of a program."""


@dataclass(frozen=True)
class SiluConfig:
    num_warps: int


def default_config(size: int) -> SiluConfig:
    padded = triton.next_power_of_2(size)
    return SiluConfig(4 if padded <= 4096 else 8 if padded <= 8192 else 32)


@triton.jit
def _silu_and_quantize_kernel(
    gate_up,  # [num_rows, 2 * SIZE], gate first
    values,  # [num_rows, NUM_BLOCKS * 2 * HALF]
    scales,  # [num_rows] float32
    stride_in,
    limit,
    smallest,
    SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    source = gate_up + row * stride_in
    blocks = tl.arange(0, PADDED_BLOCKS)[:, None]
    columns = blocks * 2 * HALF + tl.arange(0, HALF)[None, :]
    # Rounded as the row would have been on its way through memory.
    DTYPE: tl.constexpr = gate_up.dtype.element_ty
    first = load_gated(source, columns, SIZE).to(DTYPE)
    second = load_gated(source, columns + HALF, SIZE).to(DTYPE)
    both = tl.interleave(first, second).to(tl.float32)
    scale = row_scale(tl.max(tl.max(tl.abs(both), 1), 0), smallest, limit)
    tl.store(scales + row, scale)
    targets = blocks * 2 * HALF + tl.arange(0, 2 * HALF)[None, :]
    codes = round_codes(both / scale, limit, values.dtype.element_ty)
    tl.store(values + row * NUM_BLOCKS * 2 * HALF + targets, codes, mask=blocks < NUM_BLOCKS)


def silu_and_quantize(
    gate_up: Tensor, codes: torch.dtype, *, config: SiluConfig | None = None, pdl: bool = False
) -> QuantizedRows:
    """The rows that ``quantize_rows`` makes of ``silu_and_mul`` of gate_up [T, 2 * I], bit for bit; I at most MAX_SIZE.

    codes: int8 or float8_e4m3fn.
    """
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    check_dtype("gate_up", gate_up, FLOAT_DTYPES)
    check_shape("gate_up", gate_up, (num_rows, 2 * size))
    check_last_contiguous("gate_up", gate_up)
    if size > MAX_SIZE:
        raise ValueError(f"gate_up has {size} outputs; at most {MAX_SIZE} are allowed")
    rows = allocate_rows(num_rows, size, codes, dtype=gate_up.dtype, device=gate_up.device)
    config = config or default_config(size)
    num_blocks = triton.cdiv(size, BLOCK)
    if num_rows:
        _silu_and_quantize_kernel[(num_rows,)](
            gate_up, rows.values, rows.scales, gate_up.stride(0), rows.limit, SMALLEST,
            SIZE=size, NUM_BLOCKS=num_blocks, PADDED_BLOCKS=triton.next_power_of_2(num_blocks), HALF=BLOCK // 2,
            PDL=pdl, num_warps=config.num_warps, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return rows
