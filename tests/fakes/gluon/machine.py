"""One emulated program: threads that take turns, and what runs beside them in the memory and matrix units."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .races import Clock, Race, Region, learn
from .values import Tile, Value, plain

if TYPE_CHECKING:
    from .shared_tile import SharedTile


class Deadlock(AssertionError):
    """Everyone waits."""


class _Aborted(BaseException):
    """Ends the threads of a program that has failed."""


class Barrier:
    """An mbarrier: a phase is over when all have arrived and all bytes that were announced are there."""

    def __init__(self) -> None:
        self._count = self._missing = 0
        self._num_bytes = 0
        self.phase = 1
        """Number of the one that is not over yet."""
        self._arrived: Clock = {}
        self.clock: Clock = {}
        """What a phase that is over lets know."""

    def init(self, count: int) -> None:
        self._count = self._missing = count

    def arrive(self, clock: Clock, count: int = 1) -> None:
        self._missing -= count
        if self._missing < 0:
            raise Race("more arrive at a barrier than it waits for")
        learn(self._arrived, clock)
        self._end_phase()

    def announce(self, clock: Clock, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self.arrive(clock)

    def receive(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes
        self._end_phase()

    def is_over(self, parity: int) -> bool:
        return self.phase & 1 == parity

    def _end_phase(self) -> None:
        if self._missing == 0 and self._num_bytes == 0:
            self._missing = self._count
            self.clock = {**self._arrived, self: self.phase}
            self.phase += 1


class Barriers:
    def __init__(self, count: int) -> None:
        self._barriers = [Barrier() for _ in range(count)]
        self.shape = [count, 1]

    def index(self, index: Any) -> Barrier:
        return self._barriers[int(plain(index))]


@dataclass(eq=False)
class Copy:
    """From ``source``, as it is in the end, to ``target``, for the barrier's phase of when it began."""

    source: Callable[[], Tensor]
    target: SharedTile
    barrier: Barrier
    phase: int = field(init=False)

    def __post_init__(self) -> None:
        self.phase = self.barrier.phase

    def end(self) -> None:
        if self.barrier.phase != self.phase:
            raise Race("a copy ends after its barrier's phase: more bytes come than are announced")
        values = self.source()
        self.target.write(values)
        self.barrier.receive(values.numel() * values.element_size())


class Product(Value):
    """left right + before, which may be a product that has not ended."""

    def __init__(self, left: Tile | SharedTile, right: SharedTile, before: Tile | Product) -> None:
        self._left, self._right = left, right
        self._before = before
        self.layout: Any = before.layout
        self.shape: list[int] = before.shape
        self.sources = [operand.region for operand in (left, right) if not isinstance(operand, Tile)]
        self.result: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        raise Race(f"{name} of a product that has not been waited for")

    def end(self) -> None:
        before = self._before.result if isinstance(self._before, Product) else self._before.value
        assert before is not None, "products end in order"
        left = self._left.value if isinstance(self._left, Tile) else self._left.read()
        # Sums of products of int8 are exact in float64, for which there is a fast product.
        exact = before.dtype if before.is_floating_point() else torch.float64
        self.result = before + (left.to(exact) @ self._right.read().to(exact)).to(before.dtype)


@dataclass(eq=False)
class Role:
    """What one group of warps does."""

    name: str
    function: Callable[[], None]
    clock: Clock
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    may_go_on: Callable[[], bool] = lambda: True
    products: list[Product] = field(default_factory=list)
    unfenced: list[tuple[Region, int]] = field(default_factory=list)
    """What it has written, when, and not yet shown to the matrix units."""
    is_done: bool = False

    def __post_init__(self) -> None:
        self.clock = {**self.clock, self: 1}

    @property
    def time(self) -> int:
        return self.clock[self]


class Machine:
    """Runs the roles of one program; before and after them one more."""

    def __init__(self, program: int, num_programs: int, seed: int, kernel: Callable[[], None]) -> None:
        self.program, self.num_programs = program, num_programs
        self._random = random.Random(seed)
        self._copies: list[Copy] = []
        self._whole = self._role = Role("the program", kernel, {})
        self._roles = [self._whole]
        self._end = threading.Semaphore(0)
        self._error: BaseException | None = None

    def run(self) -> None:
        """Raises the kernel's errors, ``Race`` and ``Deadlock``."""
        _current.machine = self
        try:
            self._whole.function()
        finally:
            _current.machine = None
        if self._whole.products or self._copies:
            raise Race("a program ends before its copies and products")

    def run_roles(self, functions: list[tuple[str, Callable[[], None]]]) -> None:
        self._roles = [Role(name, function, self._whole.clock) for name, function in functions]
        threads = [threading.Thread(target=self._play, args=(role,), daemon=True) for role in self._roles]
        for thread in threads:
            thread.start()
        self._hand_on()
        self._end.acquire()
        for role, thread in zip(self._roles, threads, strict=True):
            role.turn.release()
            thread.join()
        if self._error is not None:
            raise self._error
        for role in self._roles:
            learn(self._whole.clock, role.clock)
        self._role, self._roles = self._whole, [self._whole]

    def _play(self, role: Role) -> None:
        role.turn.acquire()
        if self._error is not None:
            return
        _current.machine = self
        try:
            role.function()
            if role.products:
                raise Race(f"{role.name} ends before its products")
            role.is_done = True
            self._hand_on()
        except _Aborted:
            return
        except BaseException as error:
            self._error = error
            self._end.release()

    def _hand_on(self) -> None:
        if all(role.is_done for role in self._roles):
            self._end.release()
        else:
            self._role = self._choose()
            self._role.turn.release()

    def _choose(self) -> Role:
        """The one that goes on; copies may end before."""
        while True:
            ready = [role for role in self._roles if not role.is_done and role.may_go_on()] + self._copies
            if not ready:
                raise Deadlock(", ".join(f"{role.name} waits" for role in self._roles if not role.is_done))
            chosen = self._random.choice(ready)
            if isinstance(chosen, Role):
                return chosen
            self._copies.remove(chosen)
            chosen.end()

    def wait(self, barrier: Barrier, parity: int) -> None:
        role = self._role
        role.may_go_on = lambda: barrier.is_over(parity)
        self._role = self._choose()
        if self._role is not role:
            self._role.turn.release()
            role.turn.acquire()
            if self._error is not None:
                raise _Aborted
        learn(role.clock, barrier.clock)

    def arrive(self, barrier: Barrier, count: int) -> None:
        barrier.arrive(self._role.clock, count)
        self._role.clock[self._role] += 1

    def announce(self, barrier: Barrier, num_bytes: int) -> None:
        barrier.announce(self._role.clock, num_bytes)
        self._role.clock[self._role] += 1

    def load(self, region: Region) -> None:
        self._check_copied(region)
        region.memory.use(region, self._role, self._role.time)

    def store(self, region: Region, *, changes: bool) -> None:
        self._check_copied(region)
        if changes:
            self._check_unused(region)
        region.memory.use(region, self._role, self._role.time)
        self._role.unfenced.append((region, self._role.time))

    def fence(self) -> None:
        self._role.unfenced.clear()

    def copy(self, copy: Copy) -> None:
        region = copy.target.region
        self._check_copied(region)
        self._check_unused(region)
        region.memory.copy(region, copy.barrier, copy.phase)
        self._copies.append(copy)

    def multiply(self, product: Product) -> None:
        for region in product.sources:
            self._check_copied(region)
            for role in self._roles:
                known = self._role.clock.get(role, 0)
                if any(time <= known and region.overlaps(written) for written, time in role.unfenced):
                    raise Race(f"{self._role.name} multiplies what {role.name} has written without a fence")
        self._role.products.append(product)

    def end_products(self, num_left: int) -> None:
        """The role's oldest ones, all but ``num_left``."""
        role = self._role
        while len(role.products) > num_left:
            product = role.products.pop(0)
            product.end()
            for region in product.sources:
                region.memory.use(region, role, role.time)

    def _check_copied(self, region: Region) -> None:
        region.memory.check_copied(region, self._role.clock, self._role.name)

    def _check_unused(self, region: Region) -> None:
        region.memory.check_unused(region, self._role.clock, self._role.name)
        for role in self._roles:
            for product in role.products:
                if any(region.overlaps(source) for source in product.sources):
                    raise Race(f"{self._role.name} overwrites what a product of {role.name} reads")


class _Current(threading.local):
    machine: Machine | None = None


_current = _Current()


def machine() -> Machine:
    """The one whose program this thread runs."""
    assert _current.machine is not None, "no program runs"
    return _current.machine
