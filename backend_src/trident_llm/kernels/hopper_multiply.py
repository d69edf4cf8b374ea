"""Groups of four warps that multiply packed weights with rows of x, and the warps that load for them, in Gluon for
Hopper. Knows nothing of the layer it serves.

Three tuples go around. ring: x [X_STAGES, TILE_ROWS, 64] and words [W_STAGES * 2 * PANELS, 64, 64] in shared memory,
each with its barriers "full" and "empty". work: as in ``hopper_tiles``. sizes: num_rows, num_outputs, num_inputs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma
from triton.language.extra.cuda import gdc_wait

from .hopper_barriers import barrier, begin_fill, release, wait_filled, wait_for
from .hopper_tiles import count_items, locate_panel, locate_tile, store_tile, wait_for_products
from .unpack_codes import offset_base, unpack_text

CHUNK: gl.constexpr = gl.constexpr(64)
"""Inputs between two codes of a word, inputs of a stage of x, and outputs of a panel."""


@gluon.jit
def load_words(
    word_rows,  # [panels * blocks * 64, 64] int16, in boxes of [64, 64]
    ring,
    work,
    num_outputs,
    PANELS: gl.constexpr,
    SILU: gl.constexpr,
):
    """What the warp does that loads words. They are constant: it waits for no earlier kernel."""
    _x, _x_full, _x_empty, words, full, empty = ring
    blocks = work[3]
    num_items = count_items(work)
    count = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        _row_tile, output_tile, _split, begin, end = locate_tile(item, work)
        for block in range(begin, end):
            stage = begin_fill(full, empty, count, 2 * PANELS * CHUNK * CHUNK * 2)
            for index in gl.static_range(2 * PANELS):
                panel = locate_panel(output_tile, index, num_outputs, 2 * PANELS, SILU)
                tma.async_copy_global_to_shared(
                    word_rows,
                    [(panel * blocks + block) * CHUNK, 0],
                    full.index(stage),
                    words.index(stage * (2 * PANELS) + index),
                )
            count += 1


@gluon.jit
def load_x(
    x_rows,  # [num_rows, num_inputs], in boxes of [TILE_ROWS, 64]
    ring,
    work,
    VALUES: gl.constexpr,
    PDL: gl.constexpr,
):
    """What the warp does that loads x."""
    x_shared, full, empty, _words, _words_full, _words_empty = ring
    TILE_ROWS: gl.constexpr = x_shared.shape[1]
    if PDL:
        gdc_wait()
    num_items = count_items(work)
    count = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        row_tile, _output_tile, _split, begin, end = locate_tile(item, work)
        for part in range(begin * VALUES, end * VALUES):
            stage = begin_fill(full, empty, count, TILE_ROWS * CHUNK * 2)
            tma.async_copy_global_to_shared(
                x_rows, [row_tile * TILE_ROWS, part * CHUNK], full.index(stage), x_shared.index(stage)
            )
            count += 1


@gluon.jit
def _load_pairs(
    scales_and_zeros, outputs, stride, last_group, block,
    BLOCK: gl.constexpr, GROUP_SIZE: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Scales and zeros of a block's groups, for each panel in turn. GROUP_SIZE: 0 where a group is a whole row."""
    PANELS: gl.constexpr = len(outputs)
    pairs = ()  # type: tuple
    for panel in gl.static_range(PANELS):
        for group in gl.static_range(GROUPS):
            row = scales_and_zeros
            if GROUP_SIZE > 0:
                # The last block may go beyond the last group: codes and x are zeros there.
                row += gl.minimum(block * BLOCK // GROUP_SIZE + group, last_group) * stride
            pairs = pairs + (gl.load(row + outputs[panel]),)
    return pairs


@gluon.jit
def _numbers(words, pair, VALUE: gl.constexpr, BITS: gl.constexpr, DTYPE: gl.constexpr):
    """As ``unpack_codes.unpack``, times the scales; pair: scales and zeros of the words' outputs."""
    TEXT: gl.constexpr = unpack_text(BITS, VALUE, DTYPE.is_fp16(), True)
    offsets = ((pair >> 16) + offset_base(BITS, DTYPE.is_fp16())).to(DTYPE)
    scales = (pair & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32).to(DTYPE)
    offsets = gl.broadcast(offsets[:, None], words)[0]
    scales = gl.broadcast(scales[:, None], words)[0]
    numbers = gl.inline_asm_elementwise(
        TEXT, "=r,r,r,r", [words, offsets, scales], dtype=gl.int16, is_pure=True, pack=2
    )
    return numbers.to(DTYPE, bitcast=True)


@gluon.jit
def multiply_tiles(
    out,
    bias,
    scales_and_zeros,
    ring,
    work,
    sizes,
    strides,  # of groups, of out's rows and parts
    BITS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    PANELS: gl.constexpr,
    DTYPE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SILU: gl.constexpr,
    WARP_GROUP: gl.constexpr,
):
    """What group of warps 0 or 1 does. Arguments as in the kernel."""
    x_shared, x_full, x_empty, words_shared, words_full, words_empty = ring
    num_rows, num_outputs, num_inputs = sizes
    stride_groups, stride_out, stride_split = strides
    X_STAGES: gl.constexpr = x_shared.shape[0]
    TILE_ROWS: gl.constexpr = x_shared.shape[1]
    VALUES: gl.constexpr = 16 // BITS
    BLOCK: gl.constexpr = VALUES * CHUNK
    GROUPS: gl.constexpr = BLOCK // GROUP_SIZE if GROUP_SIZE > 0 and GROUP_SIZE < BLOCK else 1
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_ROWS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    # Words are unpacked beside the group's own products where registers allow for two unpacked tiles.
    OVERLAPS: gl.constexpr = PANELS == 1 or TILE_ROWS <= 64
    in_panel = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, LEFT))
    num_items = count_items(work)
    last_group = (num_inputs - 1) // GROUP_SIZE if GROUP_SIZE > 0 else 0
    x_count = 0
    count = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        row_tile, output_tile, split, begin, end = locate_tile(item, work)
        outputs = ()  # type: tuple
        sums = ()  # type: tuple
        for index in gl.static_range(PANELS):
            panel = locate_panel(output_tile, WARP_GROUP * PANELS + index, num_outputs, 2 * PANELS, SILU)
            # Outputs beyond the last have words of zeros and somebody else's scales; nothing is written for them.
            last = num_outputs * (2 if SILU else 1) - 1
            outputs = outputs + (gl.minimum(panel * CHUNK + in_panel, last),)
            sums = sums + (gl.zeros([CHUNK, TILE_ROWS], gl.float32, layout=SUMS),)
        pairs = _load_pairs(
            scales_and_zeros, outputs, stride_groups, last_group, begin, BLOCK, GROUP_SIZE, GROUPS
        )
        for block in range(begin, end):
            following = gl.minimum(block + 1, end - 1)
            next_pairs = _load_pairs(
                scales_and_zeros, outputs, stride_groups, last_group, following, BLOCK, GROUP_SIZE, GROUPS
            )
            stage = wait_filled(words_full, count)
            words = ()  # type: tuple
            for index in gl.static_range(PANELS):
                words = words + (words_shared.index(stage * (2 * PANELS) + WARP_GROUP * PANELS + index).load(LEFT),)
            fence_async_shared()
            barrier()
            release(words_empty, stage)
            count += 1
            for value in gl.static_range(VALUES):
                x_stage = x_count % X_STAGES
                started = ()  # type: tuple
                for index in gl.static_range(PANELS):
                    pair = pairs[index * GROUPS + value * GROUPS // VALUES]
                    numbers = _numbers(words[index], pair, value, BITS, DTYPE)
                    if index == 0:
                        wait_for(x_full, x_stage, x_count // X_STAGES & 1)
                    x_tile = x_shared.index(x_stage).permute((1, 0))
                    started = started + (warpgroup_mma(numbers, x_tile, sums[index], is_async=True),)
                sums = started
                if OVERLAPS and value > 0:
                    # The products before are done, and with them their stage of x.
                    sums = wait_for_products(PANELS, sums)
                    release(x_empty, (x_count + X_STAGES - 1) % X_STAGES)
                if not OVERLAPS or value == VALUES - 1:
                    sums = wait_for_products(0, sums)
                    release(x_empty, x_stage)
                x_count += 1
            pairs = next_pairs
        first_row = row_tile * TILE_ROWS
        target = out + split.to(gl.int64) * stride_split + first_row.to(gl.int64) * stride_out
        row_limit = num_rows - first_row
        if SILU:
            # Rounded in between as two kernels would round: the fusion does not change the result.
            gate = sums[0].to(out.dtype.element_ty).to(gl.float32)
            up = sums[1].to(out.dtype.element_ty).to(gl.float32)
            sums = (gate / (1.0 + gl.exp(-gate)) * up,)
        for index in gl.static_range(1 if SILU else PANELS):
            first_output = locate_panel(output_tile, WARP_GROUP * PANELS + index, num_outputs, 2 * PANELS, SILU) * CHUNK
            result = sums[index]
            if HAS_BIAS:
                biased = first_output + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, SUMS))
                added = gl.load(bias + biased, mask=biased < num_outputs, other=0.0)
                result += added.to(gl.float32)[:, None]
            store_tile(target + first_output, result, row_limit, num_outputs - first_output, stride_out)
