"""A pytest plugin for processes with TRITON_INTERPRET=1: makes the interpreter of the Triton language faster.

Whenever a kernel calls a function, the interpreter replaces the builtins of the language again, which the kernel's
launch has done already; that takes a third of the time. And it makes a table of all dtypes whenever it looks one up.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_patched: set[int] = set()
"""The modules of the language that the launch in progress has patched."""


class _Launch:
    """What ``_patch_lang`` returns."""

    def __init__(self, scope: Any) -> None:
        self._scope = scope

    def restore(self) -> None:
        _patched.clear()
        self._scope.restore()


def _patch_once(fn: Any) -> _Launch | None:
    modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
    if modules <= _patched:
        return None  # of a call, which restores nothing
    _patched.update(modules)
    return _Launch(_patch_lang(fn))


interpreter._patch_lang = _patch_once


_get_np_dtype = interpreter._get_np_dtype
_numpy_dtypes: dict[str, Any] = {}
"""By name of the language's scalar type."""


def _look_up(dtype: Any) -> Any:
    scalar = dtype.scalar
    if scalar.is_ptr():
        return _get_np_dtype(scalar)
    if scalar.name not in _numpy_dtypes:
        _numpy_dtypes[scalar.name] = _get_np_dtype(scalar)
    return _numpy_dtypes[scalar.name]


interpreter._get_np_dtype = _look_up
