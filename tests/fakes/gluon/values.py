"""Values of an emulated Gluon program: scalars, tiles of tensors, and pointers into tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

_TORCH_DTYPES = {
    "int1": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
_GLUON_DTYPES = {
    torch.bool: gl.int1,
    torch.int8: gl.int8,
    torch.int16: gl.int16,
    torch.int32: gl.int32,
    torch.int64: gl.int64,
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
    torch.float32: gl.float32,
}
Number: TypeAlias = "int | float | Scalar"


def torch_dtype(dtype: gl.dtype) -> torch.dtype:
    return _TORCH_DTYPES[dtype.name]


def gluon_dtype(dtype: torch.dtype) -> gl.dtype:
    return _GLUON_DTYPES[dtype]


def plain(value: Any) -> Any:
    """The tensor of a tile, the number of a scalar; all else as it is."""
    return value.value if isinstance(value, Scalar | Tile) else value


def wrap(value: Any, layout: Any = None) -> Any:
    return Tile(value, layout) if isinstance(value, Tensor) else Scalar(value)


def _divide(left: Any, right: Any) -> Any:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return torch.div(left, right, rounding_mode="trunc")
    quotient = abs(left) // abs(right)
    return quotient if (left < 0) == (right < 0) else -quotient


def _rest(left: Any, right: Any) -> Any:
    return left - _divide(left, right) * right


class Value:
    """Arithmetic as in the Triton language: the division of integers cuts off."""

    value: Any

    def _apply(self, function: Callable[[Any, Any], Any], other: Any, *, swap: bool = False) -> Any:
        if isinstance(other, Pointer):
            return other + self
        operands = (plain(other), self.value) if swap else (self.value, plain(other))
        layout = getattr(self, "layout", None) or getattr(other, "layout", None)
        return wrap(function(*operands), layout)

    def __neg__(self) -> Any:
        return wrap(-self.value, getattr(self, "layout", None))

    def __bool__(self) -> bool:
        raise TypeError("a tile is no condition")

    def __hash__(self) -> int:
        raise TypeError("a value of a kernel is no key")


def _operators() -> Iterator[tuple[str, Callable[[Any, Any], Any]]]:
    for name in ("add", "sub", "mul", "truediv", "lshift", "rshift", "and_", "or_", "xor"):
        yield name.rstrip("_"), getattr(operator, name)
    yield from (("floordiv", _divide), ("mod", _rest))


def _binary(function: Callable[[Any, Any], Any], *, swap: bool = False) -> Callable[[Any, Any], Any]:
    return lambda self, other: self._apply(function, other, swap=swap)


for _name, _function in _operators():
    setattr(Value, f"__{_name}__", _binary(_function))
    setattr(Value, f"__r{_name}__", _binary(_function, swap=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _binary(getattr(operator, _name)))


class Scalar(Value):
    """A number that all threads of a program share."""

    def __init__(self, value: Number | bool) -> None:
        self.value = plain(value)

    def __index__(self) -> int:
        return operator.index(self.value)

    def __bool__(self) -> bool:
        return bool(self.value)

    def to(self, dtype: gl.dtype) -> Scalar:
        return Scalar(float(self.value) if dtype.is_floating() else int(self.value))


class Tile(Value):
    """Elements in registers. ``layout`` is only handed on: that layouts agree is the compiler's to check."""

    def __init__(self, value: Tensor, layout: Any = None) -> None:
        self.value = value
        self.layout = layout

    @property
    def shape(self) -> list[int]:
        return list(self.value.shape)

    @property
    def dtype(self) -> gl.dtype:
        return gluon_dtype(self.value.dtype)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=self.layout)

    def to(self, dtype: gl.dtype, bitcast: bool = False) -> Tile:
        target = torch_dtype(dtype)
        return Tile(self.value.view(target) if bitcast else self.value.to(target), self.layout)

    def __getitem__(self, index: Any) -> Tile:
        return Tile(self.value[index], self.layout)


class Pointer:
    """One address, or a tile of them. What is read and written lies inside the storage of one tensor."""

    def __init__(self, storage: Tensor, offset: int | Tensor) -> None:
        self._storage = storage
        self._offset = offset

    @classmethod
    def to_tensor(cls, tensor: Tensor) -> Pointer:
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        return cls(whole, int(tensor.storage_offset()))

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=gluon_dtype(self._storage.dtype))

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self._storage, self._offset + plain(other))

    __radd__ = __add__

    def load(self, mask: Any = True, other: Any = None) -> Any:
        """Elements without a mask, and without ``other``, are what no kernel may rely on."""
        if not isinstance(self._offset, Tensor):
            if not plain(mask):
                return Scalar(plain(other) if other is not None else -(1 << 30))
            return Scalar(self._storage[self._checked(torch.tensor(self._offset))].item())
        offset, taken = self._places(mask)
        missing = plain(other) if other is not None else (float("nan") if self._storage.is_floating_point() else -1)
        result = torch.full(offset.shape, missing, dtype=self._storage.dtype)
        result[taken] = self._storage[self._checked(offset[taken])]
        return Tile(result)

    def store(self, value: Any, mask: Any = True) -> None:
        offset, taken = self._places(mask)
        self._storage[self._checked(offset[taken])] = plain(value).expand(offset.shape)[taken]

    def _places(self, mask: Any) -> tuple[Tensor, Tensor]:
        offset, taken = torch.broadcast_tensors(torch.as_tensor(self._offset), torch.as_tensor(plain(mask)))
        return offset.long(), taken.bool()

    def _checked(self, offset: Tensor) -> Tensor:
        if offset.numel() and not 0 <= int(offset.min()) <= int(offset.max()) < len(self._storage):
            raise IndexError(f"offsets {int(offset.min())} to {int(offset.max())} of {len(self._storage)} elements")
        return offset


class Range:
    """``range``, whose numbers are scalars."""

    def __init__(self, *bounds: Any) -> None:
        self._numbers = range(*map(operator.index, bounds))

    def __iter__(self) -> Iterator[Scalar]:
        return map(Scalar, self._numbers)
