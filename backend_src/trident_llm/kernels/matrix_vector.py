"""Linear layers of very few rows: each program holds whole rows of the weight in registers. Bound by memory bandwidth.

With programmatic dependent launch a program loads its weights while the previous kernel still runs, and waits only
before it reads x. Knows nothing of the layer it serves.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import HALF_DTYPES, check_dtype, check_last_contiguous, check_shape

MAX_ROWS = 2
"""More rows of x cost more arithmetic and more reads of x per weight than memory time hides: at 4 rows this kernel
reads gate and up of Mistral-7B at 2,782 GB/s on an H100, at 2 rows at 3,090."""


@dataclass(frozen=True)
class MatrixVectorConfig:
    tile_outputs: int
    """Weight rows per program."""
    tile_inputs: int
    """Columns loaded at once: a power of two."""
    num_warps: int


def default_config(num_rows: int, num_inputs: int) -> MatrixVectorConfig:
    """8 KiB of the weight in flight per program; the fastest of those timed within whole decode steps on an H100."""
    if num_inputs > 4096:
        return MatrixVectorConfig(1, 4096 if num_rows == 1 else 8192, 8)
    tile = min(max(triton.next_power_of_2(num_inputs), 256), 2048)
    return MatrixVectorConfig(2, tile, max(1, tile // 256))


@triton.jit
def _matrix_vector_kernel(
    x,  # [num_rows, NUM_INPUTS]
    weight,  # [num_outputs, NUM_INPUTS]; [2 * num_outputs, NUM_INPUTS], gate first, with SILU
    bias,  # [num_outputs]; unused unless HAS_BIAS
    out,  # [num_rows, num_outputs]
    num_outputs,
    num_rows,
    stride_x,
    stride_weight,
    stride_out,
    NUM_INPUTS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    # Loads are [rows, outputs, columns] like the products: with one layout nothing passes through shared memory.
    outputs = (tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS))[None, :, None]
    columns = tl.arange(0, TILE_INPUTS)[None, None, :]
    rows = tl.arange(0, PADDED_ROWS)[:, None, None]
    in_range = outputs < num_outputs
    pointers = weight + outputs.to(tl.int64) * stride_weight + columns
    mask = in_range & (columns < NUM_INPUTS)
    w = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
    if SILU:
        up_pointers = pointers + num_outputs.to(tl.int64) * stride_weight
        up = tl.load(up_pointers, mask=mask, other=0.0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
    x_pointers = x + rows * stride_x + columns
    values = tl.load(x_pointers, mask=(rows < num_rows) & (columns < NUM_INPUTS), other=0.0).to(tl.float32)
    # The sum over the tile is taken once, at the end: until then every thread adds up its own columns.
    acc = values * w.to(tl.float32)
    if SILU:
        acc_up = values * up.to(tl.float32)
    for first in tl.static_range(TILE_INPUTS, NUM_INPUTS, TILE_INPUTS):
        inside = first + columns < NUM_INPUTS
        w = tl.load(pointers + first, mask=in_range & inside, other=0.0, eviction_policy="evict_first")
        values = tl.load(x_pointers + first, mask=(rows < num_rows) & inside, other=0.0).to(tl.float32)
        acc += values * w.to(tl.float32)
        if SILU:
            up = tl.load(up_pointers + first, mask=in_range & inside, other=0.0, eviction_policy="evict_first")
            acc_up += values * up.to(tl.float32)
    result = tl.sum(acc, 2, keep_dims=True)
    if HAS_BIAS:
        result += tl.load(bias + outputs, mask=in_range, other=0.0).to(tl.float32)
    if SILU:
        # Rounded in between as two kernels would round: the fusion does not change the result.
        gate = result.to(out.dtype.element_ty).to(tl.float32)
        factor = tl.sum(acc_up, 2, keep_dims=True).to(out.dtype.element_ty).to(tl.float32)
        result = gate / (1.0 + tl.exp(-gate)) * factor
    tl.store(out + rows * stride_out + outputs, result.to(out.dtype.element_ty), mask=(rows < num_rows) & in_range)


def matrix_vector(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    silu_and_mul: bool = False,
    config: MatrixVectorConfig | None = None,
    pdl: bool = False,
) -> None:
    """x [T, in] times weight [out, in] transposed, plus bias [out], into out [T, out]; T at most ``MAX_ROWS``.

    silu_and_mul: weight is [2 * out, in], gate first, and out is silu(gate) * up; there is no bias then. bf16 or fp16,
    sums in float32. With pdl the weight must not be written by the kernel launched just before.
    """
    num_rows, num_inputs = x.shape
    num_outputs = out.shape[1]
    check_dtype("x", x, HALF_DTYPES)
    check_dtype("weight", weight, (x.dtype,))
    check_shape("weight", weight, ((2 if silu_and_mul else 1) * num_outputs, num_inputs))
    check_shape("out", out, (num_rows, num_outputs))
    for name, tensor in (("x", x), ("weight", weight), ("out", out)):
        check_last_contiguous(name, tensor)
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"x has {num_rows} rows; allowed: 1 to {MAX_ROWS}")
    if silu_and_mul and bias is not None:
        raise ValueError("silu_and_mul takes no bias")
    config = config or default_config(num_rows, num_inputs)
    _matrix_vector_kernel[(triton.cdiv(num_outputs, config.tile_outputs),)](
        x, weight, bias, out, num_outputs, num_rows, x.stride(0), weight.stride(0), out.stride(0),
        NUM_INPUTS=num_inputs, PADDED_ROWS=triton.next_power_of_2(num_rows), TILE_OUTPUTS=config.tile_outputs,
        TILE_INPUTS=config.tile_inputs, HAS_BIAS=bias is not None, SILU=silu_and_mul, PDL=pdl,
        num_warps=config.num_warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
