"""The emulator of Gluon kernels finds what is wrong with a kernel, in any order of its warps, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.fakes.gluon.language import emulate
from tests.fakes.gluon.machine import Deadlock
from tests.fakes.gluon.ptx import run_ptx
from tests.fakes.gluon.races import Race
from trident_llm.kernels.hopper_barriers import release, wait_for

SIZE, STAGES, BLOCKS = 64, 2, 5
ROWS_LAYOUT = gl.NVMMASharedLayout(128, 16, rank=2)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch.setattr)


@gluon.jit
def _load(x_rows, ring, FAULT: gl.constexpr, BLOCKS: gl.constexpr):
    tiles, full, empty, _doubled, unused = ring
    halves = tiles._reinterpret(tiles.dtype, [2 * tiles.shape[0], 32, 64], tiles.layout)
    for block in range(0, BLOCKS):
        stage = block % tiles.shape[0]
        if FAULT != "no wait for a release":
            wait_for(empty, stage, (block // tiles.shape[0] & 1) ^ 1)
        extra = 16 if FAULT == "more bytes announced" else -16 if FAULT == "fewer bytes announced" else 0
        second = unused if FAULT == "no wait for a copy" else full
        mbarrier.expect(full.index(stage), 64 * 64 * (1 if FAULT == "no wait for a copy" else 2) + extra)
        tma.async_copy_global_to_shared(x_rows, [0, block * 64], full.index(stage), halves.index(stage * 2))
        tma.async_copy_global_to_shared(x_rows, [32, block * 64], second.index(stage), halves.index(stage * 2 + 1))


@gluon.jit
def _double(ring, FAULT: gl.constexpr, BLOCKS: gl.constexpr):
    """Another group of warps than the one that multiplies."""
    tiles, full, _empty, doubled, _unused = ring
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for block in range(0, BLOCKS):
        stage = block % tiles.shape[0]
        wait_for(full, stage, block // tiles.shape[0] & 1)
        tile = tiles.index(stage)
        tile.store(tile.load(LAYOUT) * 2)
        if FAULT != "no fence":
            fence_async_shared()
        release(doubled, stage)


@gluon.jit
def _multiply(out, ring, FAULT: gl.constexpr, BLOCKS: gl.constexpr):
    tiles, _full, empty, doubled, _unused = ring
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    sums = gl.zeros([64, 64], gl.float32, layout=SUMS)
    for block in range(0, BLOCKS):
        stage = block % tiles.shape[0]
        wait_for(doubled, stage, block // tiles.shape[0] & 1)
        if FAULT == "an early release":
            release(empty, stage)
        tile = tiles.index(stage)
        sums = warpgroup_mma(tile, tile.permute((1, 0)), sums, is_async=True)
        if FAULT == "a release before the product's end":
            release(empty, stage)
        if FAULT != "no wait for the last product" or block < BLOCKS - 1:
            sums = warpgroup_mma_wait(0, deps=(sums,))
        if FAULT == "two releases":
            release(empty, stage)
        if FAULT != "no release" and FAULT != "an early release" and FAULT != "a release before the product's end":
            release(empty, stage)
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, SUMS))[:, None]
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, SUMS))[None, :]
    gl.store(out + rows * 64 + columns, sums * 0.5)


@gluon.jit
def _squares_kernel(
    x_rows,  # [64, 64 * BLOCKS], in boxes of [32, 64]
    out,  # [64, 64] float32: 2 x x^T
    STAGES: gl.constexpr,
    FAULT: gl.constexpr,
    BLOCKS: gl.constexpr,
):
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(x_rows.dtype, [STAGES, 64, 64], x_rows.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    doubled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    unused = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for index in gl.static_range(STAGES):
        mbarrier.init(full.index(index), count=1)
        mbarrier.init(empty.index(index), count=1)
        mbarrier.init(doubled.index(index), count=1)
        mbarrier.init(unused.index(index), count=1)
    ring = (tiles, full, empty, doubled, unused)
    gl.warp_specialize(
        [
            (_multiply, (out, ring, FAULT, BLOCKS)),
            (_double, (ring, FAULT, BLOCKS)),
            (_load, (x_rows, ring, FAULT, BLOCKS)),
        ],
        [4, 1],
        [64, 24],
    )


def squares(x: Tensor, fault: str = "none") -> Tensor:
    rows = TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [SIZE // 2, SIZE], ROWS_LAYOUT)
    out = torch.full((SIZE, SIZE), float("nan"))
    _squares_kernel[(1,)](rows, out, STAGES=STAGES, FAULT=fault, BLOCKS=BLOCKS, num_warps=4)
    return out


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randint(-8, 8, (SIZE, BLOCKS * SIZE), generator=torch.Generator().manual_seed(0)).half()


def test_a_kernel_without_faults_gives_its_result_in_any_order(x: Tensor) -> None:
    for _ in range(10):
        assert torch.equal(squares(x), 2 * x.float() @ x.float().T)


FAULTS: list[tuple[str, type[AssertionError], str]] = [
    ("no wait for a copy", Race, "does not wait for a copy"),
    ("no wait for a release", Race, "does not wait for a copy|more arrive|overwrites"),
    ("no wait for the last product", Race, "has not been waited for"),
    ("no fence", Race, "without a fence"),
    ("an early release", Race, "overwrites"),
    ("a release before the product's end", Race, "overwrites"),
    ("two releases", AssertionError, "waits|overwrites"),
    ("no release", Deadlock, r"_load \(2\) waits"),
    ("more bytes announced", Deadlock, "waits"),
    ("fewer bytes announced", Deadlock, "waits"),
]


@pytest.mark.parametrize(("fault", "error", "message"), FAULTS)
def test_a_fault_is_found_in_every_order(fault: str, error: type[AssertionError], message: str, x: Tensor) -> None:
    for _ in range(10):
        with pytest.raises(error, match=message):
            squares(x, fault)


@gluon.jit
def _sums_kernel(
    x,  # [rows, 8] int32
    out,  # [rows]
    num_rows,
    limit,
    ROWS: gl.constexpr,
):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [1, 1], [1, 0])
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, 8, layout=gl.SliceLayout(0, LAYOUT))
    values = gl.load(x + rows[:, None] * 8 + columns[None, :], mask=(rows < limit)[:, None] & (columns >= 0)[None, :])
    gl.store(out + rows, gl.sum(values, axis=1), mask=rows < num_rows)


def test_what_lies_outside_of_a_tensor_is_not_read() -> None:
    x, out = torch.arange(24, dtype=torch.int32).view(3, 8), torch.full((3,), -5, dtype=torch.int32)
    _sums_kernel[(1,)](x, out, 3, 3, ROWS=4, num_warps=1)
    assert torch.equal(out, x.sum(-1, dtype=torch.int32))
    with pytest.raises(IndexError, match="offsets 0 to 31 of 24 elements"):
        _sums_kernel[(1,)](x, out, 3, 4, ROWS=4, num_warps=1)


def test_a_box_is_zero_outside_of_its_tensor(x: Tensor) -> None:
    x = x[:40]
    out = squares(x)
    assert torch.equal(out[:40, :40], 2 * x.float() @ x.float().T)
    assert not out[40:].any() and not out[:, 40:].any()


def halves(dtype: torch.dtype, *numbers: float) -> int:
    """Two numbers as a word, the first one low."""
    return int(torch.tensor(numbers, dtype=dtype).view(torch.int32))


F16, BF16 = torch.float16, torch.bfloat16
INSTRUCTIONS: list[tuple[str, tuple[int, ...], int]] = [
    ("mov.b32 $0, 0x80000001;", (0,), -0x7FFFFFFF),
    ("shr.u32 $0, $1, 4;", (-1,), 0x0FFFFFFF),
    ("shl.b32 $0, $1, 4;", (0x7FFFFFFF,), -16),
    ("and.b32 $0, $1, $2;", (0b1100, 0b1010), 0b1000),
    ("or.b32 $0, $1, $2;", (0b1100, 0b1010), 0b1110),
    ("xor.b32 $0, $1, $2;", (0b1100, 0b1010), 0b0110),
    # (a & b) | c, and (a & ~b) ^ c.
    ("lop3.b32 $0, $1, 0x000F000F, 0x64006400, 0xEA;", (0x12345678,), 0x64046408),
    ("lop3.b32 $0, $1, $2, $3, 0x5A;", (0b11110000, 0b11001100, 0b10101010), 0b11110000 ^ 0b10101010),
    ("lop3.b32 $0, $1, $2, $3, 0x9A;", (0b11110000, 0b11001100, 0b10101010), (0b11110000 & ~0b11001100) ^ 0b10101010),
    ("sub.rn.f16x2 $0, $1, $2;", (halves(F16, 1029, 3), halves(F16, 1024, 0.5)), halves(F16, 5, 2.5)),
    ("add.rn.bf16x2 $0, $1, $2;", (halves(BF16, 256, -1), halves(BF16, 1, 1)), halves(BF16, 256, 0)),
    ("mul.rn.bf16x2 $0, $1, $2;", (halves(BF16, 3, -2), halves(BF16, 0.5, 8)), halves(BF16, 1.5, -16)),
    # Rounded once: 1 + 3/1024 squared has 9/1048576 that a rounded product loses.
    (
        "fma.rn.f16x2 $0, $1, $1, $2;",
        (halves(F16, 1 + 3 / 1024, 2), halves(F16, -1, 1)),
        halves(F16, 6 / 1024 + 9 / 1048576, 5),
    ),
    ("{ .reg .b32 t; shr.u32 t, $1, 8; and.b32 t, t, 15; mov.b32 $0, t; }", (0xA57,), 0xA),
]


@pytest.mark.parametrize(("text", "inputs", "expected"), INSTRUCTIONS)
def test_instructions(text: str, inputs: tuple[int, ...], expected: int) -> None:
    words: list[Any] = [torch.tensor([word], dtype=torch.int32) for word in inputs]
    assert run_ptx(text, words).tolist() == [expected]
