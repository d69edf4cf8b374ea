"""One emulated program: threads that take turns, and what runs beside them in the memory and matrix units."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from .values import Tile, gluon_dtype, plain


class Race(AssertionError):
    """Two accesses to shared memory that nothing orders."""


class Deadlock(AssertionError):
    """Everyone waits."""


class _Aborted(BaseException):
    """Ends the threads of a program that has failed."""


@dataclass(frozen=True, eq=False)
class Region:
    """Elements ``start`` to ``end`` - 1 of one allocation in shared memory."""

    memory: Tensor
    start: int
    end: int

    def overlaps(self, other: Region) -> bool:
        return self.memory is other.memory and self.start < other.end and other.start < self.end


class SharedTile:
    """A part of shared memory. Rows lie as the swizzle has them: their first 128 bytes, then the next of all rows."""

    def __init__(self, memory: Tensor, start: int, shape: list[int], layout: Any, *, is_transposed: bool = False):
        self._memory = memory
        self._start = start
        self._shape = shape
        self.layout = layout
        self._is_transposed = is_transposed

    @property
    def shape(self) -> list[int]:
        return self._shape[::-1] if self._is_transposed else self._shape

    @property
    def dtype(self) -> gl.dtype:
        return gluon_dtype(self._memory.dtype)

    @property
    def region(self) -> Region:
        return Region(self._memory, self._start, self._start + math.prod(self._shape))

    def index(self, index: Any) -> SharedTile:
        place = int(plain(index))
        assert 0 <= place < self._shape[0], f"index {place} of {self._shape[0]}"
        shape = self._shape[1:]
        return SharedTile(self._memory, self._start + place * math.prod(shape), shape, self.layout)

    def permute(self, order: tuple[int, ...]) -> SharedTile:
        assert tuple(order) == (1, 0), order
        return SharedTile(self._memory, self._start, self._shape, self.layout, is_transposed=not self._is_transposed)

    def _reinterpret(self, dtype: gl.dtype, shape: list[int], layout: Any) -> SharedTile:
        assert dtype == self.dtype and math.prod(shape) == math.prod(self._shape), (shape, self._shape)
        return SharedTile(self._memory, self._start, list(shape), layout)

    def load(self, layout: Any) -> Tile:
        machine().check_no_copy_into(self.region)
        return Tile(self.read().clone(), layout)

    def store(self, tile: Tile) -> None:
        machine().check_no_copy_into(self.region)
        machine().unfenced.append(self.region)
        self.write(tile.value)

    def read(self) -> Tensor:
        """What lies here now."""
        values = self._rows().transpose(0, 1).reshape(self._shape)
        return values.T if self._is_transposed else values

    def write(self, values: Tensor) -> None:
        rows = self._rows()
        rows.copy_(values.reshape(rows.shape[1], rows.shape[0], rows.shape[2]).transpose(0, 1))

    def _rows(self) -> Tensor:
        """[chunks of a row, rows, elements of a chunk] of memory."""
        chunk = self.layout.swizzle_byte_width * 8 // self.layout.element_bitwidth
        region = self.region
        return self._memory[region.start : region.end].view(self._shape[-1] // chunk, -1, chunk)


class Barrier:
    """An mbarrier: a phase is over when all have arrived and all bytes that were announced are there."""

    def __init__(self) -> None:
        self._count = self._missing = 0
        self._num_bytes = 0
        self._phase = 0

    def init(self, count: int) -> None:
        self._count = self._missing = count

    def arrive(self, count: int = 1) -> None:
        self._missing -= count
        assert self._missing >= 0, "more arrive at a barrier than it waits for"
        self._end_phase()

    def announce(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self.arrive()

    def receive(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes
        self._end_phase()

    def is_over(self, phase: int) -> bool:
        return self._phase != phase

    def _end_phase(self) -> None:
        if self._missing == 0 and self._num_bytes == 0:
            self._phase ^= 1
            self._missing = self._count


class Barriers:
    def __init__(self, count: int) -> None:
        self._barriers = [Barrier() for _ in range(count)]
        self.shape = [count, 1]

    def index(self, index: Any) -> Barrier:
        return self._barriers[int(plain(index))]


@dataclass
class Copy:
    """From ``source``, as it is in the end, to ``target``."""

    source: Callable[[], Tensor]
    target: SharedTile
    barrier: Barrier


@dataclass(eq=False)
class Product:
    """left right + before, which may be a product that has not ended."""

    left: Tile | SharedTile
    right: SharedTile
    before: Any
    result: Tensor | None = None

    @property
    def sources(self) -> list[Region]:
        return [operand.region for operand in (self.left, self.right) if isinstance(operand, SharedTile)]

    @property
    def layout(self) -> Any:
        return self.before.layout

    def end(self) -> None:
        before = self.before.result if isinstance(self.before, Product) else self.before.value
        left = self.left.read() if isinstance(self.left, SharedTile) else self.left.value
        self.result = before + left.to(before.dtype) @ self.right.read().to(before.dtype)


@dataclass(eq=False)
class Role:
    """What one group of warps does."""

    name: str
    function: Callable[[], None]
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    may_go_on: Callable[[], bool] = lambda: True
    products: list[Product] = field(default_factory=list)
    is_done: bool = False
    error: BaseException | None = None

    def end_products(self, num_left: int) -> None:
        while len(self.products) > num_left:
            self.products.pop(0).end()


class Machine:
    """Runs the roles of one program."""

    def __init__(self, program: int, num_programs: int, seed: int) -> None:
        self.program, self.num_programs = program, num_programs
        self.unfenced: list[Region] = []
        """Written by threads, and not yet to be seen by the matrix units."""
        self._random = random.Random(seed)
        self._copies: list[Copy] = []
        self._roles: list[Role] = []
        self._role: Role | None = None
        self._turn = threading.Semaphore(0)
        self._is_aborted = False

    @property
    def role(self) -> Role:
        assert self._role is not None, "only groups of warps with duties of their own multiply and wait"
        return self._role

    def run(self, functions: list[tuple[str, Callable[[], None]]]) -> None:
        """Run all to their ends. Raises the first error of one of them, ``Race`` and ``Deadlock``."""
        self._roles = [Role(name, function) for name, function in functions]
        threads = [threading.Thread(target=self._play, args=(role,), daemon=True) for role in self._roles]
        for thread in threads:
            thread.start()
        try:
            while not all(role.is_done for role in self._roles):
                self._go_on()
        finally:
            self._is_aborted = True
            for role, thread in zip(self._roles, threads, strict=True):
                role.turn.release()
                thread.join()
        if self._copies:
            raise Race("a program ends before its copies")

    def _go_on(self) -> None:
        ready: list[Role | Copy] = [role for role in self._roles if not role.is_done and role.may_go_on()]
        ready += self._copies
        if not ready:
            raise Deadlock(", ".join(f"{role.name} waits" for role in self._roles if not role.is_done))
        chosen = self._random.choice(ready)
        if isinstance(chosen, Copy):
            self._copies.remove(chosen)
            values = chosen.source()
            chosen.target.write(values)
            chosen.barrier.receive(values.numel() * values.element_size())
            return
        self._role = chosen
        chosen.turn.release()
        self._turn.acquire()
        if chosen.error is not None:
            raise chosen.error

    def _play(self, role: Role) -> None:
        role.turn.acquire()
        _current.machine = self
        try:
            if not self._is_aborted:
                role.function()
                assert not role.products, f"{role.name} ends before its products"
        except _Aborted:
            return
        except BaseException as error:
            role.error = error
        role.is_done = True
        self._turn.release()

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Let others go on, at least until ``until`` holds."""
        role = self.role
        role.may_go_on = until
        self._turn.release()
        role.turn.acquire()
        if self._is_aborted:
            raise _Aborted

    def copy(self, copy: Copy) -> None:
        region = copy.target.region
        self.check_no_copy_into(region)
        for role in self._roles:
            for product in role.products:
                if any(region.overlaps(source) for source in product.sources):
                    raise Race(f"{self.role.name} overwrites what a product of {role.name} reads")
        self._copies.append(copy)
        self.pause()

    def multiply(self, product: Product) -> None:
        for region in product.sources:
            self.check_no_copy_into(region)
            if any(region.overlaps(written) for written in self.unfenced):
                raise Race(f"{self.role.name} multiplies what was written without a fence")
        self.role.products.append(product)
        self.pause()

    def check_no_copy_into(self, region: Region) -> None:
        if any(region.overlaps(copy.target.region) for copy in self._copies):
            raise Race(f"{self.role.name} uses what is still being copied")


class _Current(threading.local):
    machine: Machine | None = None


_current = _Current()


def machine() -> Machine:
    """The one whose program this thread runs."""
    assert _current.machine is not None, "no program runs"
    return _current.machine


def run_program(program: int, num_programs: int, seed: int, kernel: Callable[[], None]) -> None:
    _current.machine = Machine(program, num_programs, seed)
    try:
        kernel()
    finally:
        _current.machine = None


def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> SharedTile:
    """Shared memory that holds what must not be read."""
    memory = torch.empty(math.prod(shape), dtype=dtype)
    memory.fill_(float("nan") if dtype.is_floating_point else 0x55)
    return SharedTile(memory, 0, list(shape), layout)
