"""Tiles of a product in Gluon for Hopper: which one is whose turn, and its way to memory. Knows no operands."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

_NEIGHBOURS: gl.constexpr = gl.constexpr(16)
"""Tiles of rows that are multiplied one after another with the same outputs: their x stays in the L2 cache."""
PANEL: gl.constexpr = gl.constexpr(64)
"""Outputs of a matrix instruction."""
_MAX_SPLIT_ROWS = 512
"""With more the parts of a sum are too large to be written and read again."""


def num_splits(num_rows: int, num_tiles: int, most: int, num_processors: int) -> int:
    """Of 8, 4, 2 and 1 parts of a sum the most, up to ``most``, with which all tiles find a multiprocessor at once."""
    if num_rows > _MAX_SPLIT_ROWS:
        return 1
    return next((splits for splits in (8, 4, 2) if splits <= min(most, num_processors // num_tiles)), 1)


@gluon.jit
def count_items(work):
    row_tiles, output_tiles, splits, _blocks = work
    return row_tiles * output_tiles * splits


@gluon.jit
def locate_tile(item, work):
    """Of an item of work: its tiles of rows and outputs, its part of the sum, and that part's first and end block.

    work: numbers of tiles of rows and of outputs, of parts of a sum, and of blocks of inputs.
    """
    row_tiles, output_tiles, splits, blocks = work
    share = (blocks + splits - 1) // splits
    split = item // (row_tiles * output_tiles)
    rest = item % (row_tiles * output_tiles)
    first_row = rest // (_NEIGHBOURS * output_tiles) * _NEIGHBOURS
    neighbours = gl.minimum(row_tiles - first_row, _NEIGHBOURS)
    rest -= first_row * output_tiles
    begin = split * share
    return first_row + rest % neighbours, rest // neighbours, split, begin, gl.minimum(begin + share, blocks)


@gluon.jit
def locate_panel(output_tile, index, num_outputs, PANELS: gl.constexpr, SILU: gl.constexpr):
    """Panel number ``index`` of a tile of PANELS, among all of a weight's panels of 64 outputs. With SILU a tile's are
    one of gate, the same of up, and so on; the weight has num_outputs of each."""
    if SILU:
        panel = output_tile * (PANELS // 2) + index // 2 + index % 2 * (num_outputs // PANEL)
    else:
        panel = output_tile * PANELS + index
    return panel


@gluon.jit
def wait_for_products(PENDING: gl.constexpr, sums):
    """The tuple sums, once no more than PENDING products are under way."""
    if len(sums) == 1:
        waited = (warpgroup_mma_wait(PENDING, deps=sums),)
    else:
        waited = warpgroup_mma_wait(PENDING, deps=sums)
    return waited


@gluon.jit
def store_tile(target, result, row_limit, output_limit, stride_out) -> None:
    """result [outputs, rows] float32 to target [rows, outputs], inside the limits."""
    ROWS: gl.constexpr = result.shape[1]
    if ROWS == 256 and target.dtype.element_ty == gl.float32:
        # By halves: registers do not hold all sums in two layouts.
        halves = gl.permute(gl.reshape(result, [result.shape[0], 2, ROWS // 2]), (0, 2, 1))
        first, second = gl.split(halves)
        _store_rows(target, first, row_limit, output_limit, stride_out)
        _store_rows(target + ROWS // 2 * stride_out, second, row_limit - ROWS // 2, output_limit, stride_out)
    else:
        _store_rows(target, result, row_limit, output_limit, stride_out)


@gluon.jit
def _store_rows(target, result, row_limit, output_limit, stride_out) -> None:
    # A thread writes 16 bytes, so that a row's 64 outputs are written together.
    OUTPUTS: gl.constexpr = 128 // target.dtype.element_ty.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.BlockedLayout([OUTPUTS, 1], [64 // OUTPUTS, OUTPUTS // 2], [1, 4], [0, 1])
    values = gl.convert_layout(result.to(target.dtype.element_ty), LAYOUT)
    outputs = gl.arange(0, result.shape[0], layout=gl.SliceLayout(1, LAYOUT))[:, None]
    rows = gl.arange(0, result.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(target + rows * stride_out + outputs, values, mask=(rows < row_limit) & (outputs < output_limit))
