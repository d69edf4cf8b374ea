"""Gluon's functions on emulated values, and kernels whose Python runs with them instead of being compiled."""

from __future__ import annotations

import builtins
import functools
import inspect
import itertools
from collections.abc import Callable
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trident_llm.kernels import hopper_barriers

from .machine import Barrier, Barriers, Copy, Machine, Product, machine
from .ptx import run_ptx
from .shared_tile import SharedTile
from .values import Pointer, Range, Scalar, Tile, gluon_dtype, plain, torch_dtype, wrap

_KEPT = {
    "float16", "bfloat16", "float32", "int1", "int8", "int16", "int32", "int64", "constexpr",
    "NVMMASharedLayout", "NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout",
}  # fmt: skip
"""Names of the language that mean here what they mean there."""
_WORD_BYTES = 4
_seeds = itertools.count()


class Descriptor:
    """A TensorDescriptor in a kernel."""

    def __init__(self, descriptor: TensorDescriptor) -> None:
        base = descriptor.base
        self._tensor = torch.as_strided(base, list(descriptor.shape), list(descriptor.strides), base.storage_offset())
        self.block_shape = list(descriptor.block_shape)
        self.layout = descriptor.layout
        self.dtype = gluon_dtype(base.dtype)

    def box(self, corner: list[Any]) -> Tensor:
        """[*block_shape] from ``corner`` on, with zeros outside of the tensor."""
        box = torch.zeros(self.block_shape, dtype=self._tensor.dtype)
        begins = [int(plain(place)) for place in corner]
        spans = [
            (max(begin, 0), max(min(begin + size, limit), max(begin, 0)))
            for begin, size, limit in zip(begins, self.block_shape, self._tensor.shape, strict=True)
        ]
        inside = tuple(slice(*span) for span in spans)
        places = tuple(slice(low - begin, high - begin) for (low, high), begin in zip(spans, begins, strict=True))
        box[places] = self._tensor[inside]
        return box


class Mbarrier:
    """``mbarrier`` of the language."""

    MBarrierLayout = hopper.mbarrier.MBarrierLayout

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.init(count)

    def expect(self, barrier: Barrier, num_bytes: int) -> None:
        machine().announce(barrier, num_bytes)

    def arrive(self, barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
        if plain(pred):
            machine().arrive(barrier, count)

    def wait(self, barrier: Barrier, phase: Any) -> None:
        machine().wait(barrier, int(plain(phase)))


class Tma:
    """``tma`` of the language."""

    def async_copy_global_to_shared(
        self, source: Descriptor, corner: list[Any], barrier: Barrier, target: SharedTile
    ) -> None:
        assert target.shape == source.block_shape and target.dtype == source.dtype, (target.shape, source.block_shape)
        machine().copy(Copy(functools.partial(source.box, corner), target, barrier))


def mma_v2(left: Tile, right: Tile, before: Tile) -> Tile:
    return Tile(before.value + left.value.to(torch.float32) @ right.value.to(torch.float32), before.layout)


def warpgroup_mma(left: Any, right: SharedTile, before: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    assert is_async, "a product is waited for"
    if not use_acc:
        before = Tile(torch.zeros_like(before.value), before.layout)
    assert [left.shape[0], right.shape[1]] == before.shape, (left.shape, right.shape)
    product = Product(left, right, before)
    machine().multiply(product)
    return product


def warpgroup_mma_wait(num_left: int, deps: tuple[Any, ...]) -> Any:
    machine().end_products(num_left)
    waited = tuple(
        Tile(dep.result, dep.layout) if isinstance(dep, Product) and dep.result is not None else dep for dep in deps
    )
    return waited[0] if len(waited) == 1 else waited


def fence_async_shared() -> None:
    machine().fence()


def _reduced(value: Tensor) -> Tile | Scalar:
    return Tile(value) if value.dim() else Scalar(value.item())


def _nothing(*_arguments: Any) -> None:
    """What orders only that which runs in order here."""


class Language:
    """``gl``."""

    static_range = range
    nvidia = SimpleNamespace(ampere=SimpleNamespace(mma_v2=mma_v2))

    def __getattr__(self, name: str) -> Any:
        if name in _KEPT:
            return getattr(gl, name)
        raise NotImplementedError(f"gl.{name} is not emulated")

    def program_id(self, axis: int) -> Scalar:
        assert axis == 0
        return Scalar(machine().program)

    def num_programs(self, axis: int) -> Scalar:
        assert axis == 0
        return Scalar(machine().num_programs)

    def load(self, pointer: Pointer, mask: Any = True, other: Any = None, eviction_policy: str = "") -> Any:
        return pointer.load(mask, other)

    def store(self, pointer: Pointer, value: Any, mask: Any = True) -> None:
        pointer.store(value, mask)

    def arange(self, begin: int, end: int, layout: Any) -> Tile:
        return Tile(torch.arange(begin, end, dtype=torch.int32), layout)

    def full(self, shape: list[int], value: Any, dtype: gl.dtype, layout: Any) -> Tile:
        return Tile(torch.full(shape, plain(value), dtype=torch_dtype(dtype)), layout)

    def zeros(self, shape: list[int], dtype: gl.dtype, layout: Any) -> Tile:
        return self.full(shape, 0, dtype, layout)

    def zeros_like(self, tile: Tile) -> Tile:
        return Tile(torch.zeros_like(tile.value), tile.layout)

    def where(self, condition: Any, yes: Any, no: Any) -> Any:
        operands = [plain(operand) for operand in (condition, yes, no)]
        if not any(isinstance(operand, Tensor) for operand in operands):
            return Scalar(operands[1] if operands[0] else operands[2])
        layout = next(item.layout for item in (yes, no, condition) if isinstance(item, Tile))
        return Tile(torch.where(torch.as_tensor(operands[0]), *operands[1:]), layout)

    def minimum(self, left: Any, right: Any) -> Any:
        return self._extreme(torch.minimum, min, left, right)

    def maximum(self, left: Any, right: Any) -> Any:
        return self._extreme(torch.maximum, max, left, right)

    @staticmethod
    def _extreme(of_tensors: Callable[..., Tensor], of_numbers: Callable[..., Any], left: Any, right: Any) -> Any:
        layout = next((item.layout for item in (left, right) if isinstance(item, Tile)), None)
        operands = plain(left), plain(right)
        tensor = next((operand for operand in operands if isinstance(operand, Tensor)), None)
        if tensor is None:
            return Scalar(of_numbers(*operands))
        return wrap(of_tensors(*(torch.as_tensor(operand, dtype=tensor.dtype) for operand in operands)), layout)

    def max(self, tile: Tile, axis: int) -> Any:
        return _reduced(tile.value.amax(axis))

    def sum(self, tile: Tile, axis: int) -> Any:
        return _reduced(tile.value.sum(axis, dtype=tile.value.dtype))

    def exp(self, tile: Tile) -> Tile:
        return Tile(tile.value.exp(), tile.layout)

    def exp2(self, tile: Tile) -> Tile:
        return Tile(tile.value.exp2(), tile.layout)

    def convert_layout(self, tile: Tile, layout: Any) -> Tile:
        return Tile(tile.value, layout)

    def broadcast(self, left: Tile, right: Tile) -> tuple[Tile, Tile]:
        values = torch.broadcast_tensors(left.value, right.value)
        return Tile(values[0], right.layout), Tile(values[1], right.layout)

    def reshape(self, tile: Tile, shape: list[int]) -> Tile:
        return Tile(tile.value.reshape(shape))

    def permute(self, tile: Tile, order: tuple[int, ...]) -> Tile:
        return Tile(tile.value.permute(order))

    def split(self, tile: Tile) -> tuple[Tile, Tile]:
        first, second = tile.value.unbind(-1)
        return Tile(first), Tile(second)

    def inline_asm_elementwise(
        self, text: str, constraints: str, operands: list[Tile], dtype: gl.dtype, is_pure: bool, pack: int
    ) -> Tile:
        assert len(constraints.split(",")) == 1 + len(operands)
        assert all(operand.value.element_size() * pack == _WORD_BYTES for operand in operands)
        values = torch.broadcast_tensors(*(operand.value for operand in operands))
        words = run_ptx(text, [value.contiguous().view(torch.int32) for value in values])
        return Tile(words.view(torch_dtype(dtype)), operands[0].layout)

    def allocate_shared_memory(self, dtype: gl.dtype, shape: list[int], layout: Any) -> SharedTile | Barriers:
        if isinstance(layout, Mbarrier.MBarrierLayout):
            return Barriers(shape[0])
        return SharedTile.allocate(torch_dtype(dtype), shape, layout)

    def warp_specialize(self, duties: list[Any], num_warps: list[int], num_registers: list[int]) -> None:
        assert len(num_warps) == len(num_registers) == len(duties) - 1
        machine().run_roles(
            [
                (f"{function.__name__} ({number})", functools.partial(function, *arguments))
                for number, (function, arguments) in enumerate(duties)
            ]
        )


_REPLACED = {
    id(original): replacement
    for original, replacement in (
        (gl, Language()),
        (hopper.mbarrier, Mbarrier()),
        (hopper.tma, Tma()),
        (hopper.warpgroup_mma, warpgroup_mma),
        (hopper.warpgroup_mma_wait, warpgroup_mma_wait),
        (hopper.fence_async_shared, fence_async_shared),
        (hopper_barriers.barrier, _nothing),
        (gdc_wait, _nothing),
        (gdc_launch_dependents, _nothing),
    )
}


def _replacement(value: Any) -> Any:
    """What a global name of a kernel's module stands for."""
    if isinstance(value, gl.constexpr):
        return value.value
    if isinstance(value, GluonJITFunction):
        return functools.wraps(value.fn)(lambda *args, **kwargs: _emulated(value)(*args, **kwargs))
    return _REPLACED.get(id(value), value)


@functools.cache
def _emulated(function: GluonJITFunction[Any]) -> Callable[..., Any]:
    python = function.fn
    names = {name: _replacement(python.__globals__[name]) for name in _names(python.__code__) & {*python.__globals__}}
    namespace = {"__builtins__": builtins, "range": Range, **names}
    emulated = FunctionType(python.__code__, namespace, python.__name__, python.__defaults__, python.__closure__)
    emulated.__kwdefaults__ = python.__kwdefaults__
    return emulated


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*map(_names, inner))


def _run(kernel: GluonJITFunction[Any], *arguments: Any, grid: tuple[int], warmup: bool, **named: Any) -> None:
    """Takes the place of ``GluonJITFunction.run``: programs run one after another."""
    assert not warmup
    signature = inspect.signature(kernel.fn)
    options = {name: named.pop(name) for name in {*named} - {*signature.parameters}}
    bound = signature.bind(*arguments, **named).arguments
    assert bound.get("PDL", False) == options.get("launch_pdl", False)
    values = {
        name: value if "constexpr" in str(signature.parameters[name].annotation) else _argument(value)
        for name, value in bound.items()
    }
    (num_programs,) = grid
    for program in range(num_programs):
        Machine(program, num_programs, next(_seeds), functools.partial(_emulated(kernel), **values)).run()


def _argument(value: Any) -> Any:
    match value:
        case Tensor():
            return Pointer.to_tensor(value)
        case TensorDescriptor():
            return Descriptor(value)
        case None:
            return None
    return Scalar(value)


def emulate(replace: Callable[[type, str, Callable[..., None]], None]) -> None:
    """Have ``replace`` make launches of Gluon kernels emulated ones."""
    replace(GluonJITFunction, "run", _run)
