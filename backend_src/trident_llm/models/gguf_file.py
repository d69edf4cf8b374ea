"""GgufFile: the metadata and tensors of one GGUF file, checked against its length. Knows no model.

The header is read here and not by ``gguf.GGUFReader``, which makes a numpy view of every vocabulary entry:
2.3 s and 100 MB for 49,152 tokens. Block formats are the ``gguf`` package's.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ..errors import LoadFailed

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_LONGEST_ARRAY = 64
"""Longer arrays (vocabulary, merges) are given by their length."""
_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies. ``shape`` is in row-major order, as torch has it."""

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's header. ``metadata`` holds scalars, strings and short arrays; of long arrays their length."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    header_bytes: int
    """Length of the metadata and tensor descriptions; the weights begin behind it."""

    def read(self, name: str) -> np.ndarray:
        """float32 values of a tensor, in memory of their own. Raises ``LoadFailed`` for an unknown block format."""
        tensor = self.tensors[name]
        raw = np.fromfile(self.path, dtype=np.uint8, count=tensor.num_bytes, offset=tensor.offset)
        if raw.size != tensor.num_bytes:
            raise LoadFailed(f"{self.path}: tensor {name}: the file has become shorter while it was read")
        rows = raw.reshape(*tensor.shape[:-1], -1)
        try:
            return dequantize(rows, tensor.quantization).reshape(tensor.shape)
        except NotImplementedError:
            raise LoadFailed(
                f"{self.path}: tensor {name}: block format {tensor.quantization.name} is not supported"
            ) from None


def open_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file (version 2 or 3, little-endian). Raises ``LoadFailed`` naming file and tensor."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data).read()
    except (OSError, ValueError) as error:
        raise LoadFailed(f"{path}: cannot be read as GGUF: {error}") from error


class _Header:
    """A cursor over the mapped file. Raises ``ValueError`` saying what is wrong at which byte."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0

    def read(self) -> GgufFile:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}; versions 2 and 3 are supported")
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        header_bytes = self._at
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment: {alignment!r} is not a positive integer")
        start = -(-header_bytes // alignment) * alignment
        tensors = {info.name: self._placed(info, start) for info in infos}
        if len(tensors) != len(infos):
            raise ValueError("two tensors have the same name")
        return GgufFile(self._path, metadata, tensors, header_bytes)

    def _placed(self, info: GgufTensor, start: int) -> GgufTensor:
        end = start + info.offset + info.num_bytes
        if end > len(self._data):
            raise ValueError(
                f"tensor {info.name} ends at byte {end}, but the file has {len(self._data)}; it is truncated"
            )
        return GgufTensor(info.name, info.shape, info.quantization, start + info.offset, info.num_bytes)

    def _tensor_info(self) -> GgufTensor:
        name = self._string()
        num_dims = self._scalar("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise ValueError(f"tensor {name} has {num_dims} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(num_dims)]))
        code = self._scalar("I")
        try:
            quantization = GGMLQuantizationType(code)
        except ValueError:
            raise ValueError(f"tensor {name} has the unknown block format {code}") from None
        block_size, block_bytes = GGML_QUANT_SIZES[quantization]
        if shape[-1] % block_size:
            raise ValueError(f"tensor {name}: rows of {shape[-1]} do not fill blocks of {block_size}")
        num_bytes = int(np.prod(shape, dtype=object)) // block_size * block_bytes
        return GgufTensor(name, shape, quantization, self._scalar("Q"), num_bytes)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        return self._scalar(self._code(kind))

    def _array(self) -> list[Any] | int:
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind == _STRING and count > _LONGEST_ARRAY:
            for _ in range(count):
                self._advance(self._scalar("Q"))
            return count
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        code = self._code(kind)
        if count > _LONGEST_ARRAY:
            self._advance(count * struct.calcsize("<" + code))
            return count
        return [self._scalar(code) for _ in range(count)]

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"unknown or nested value type {kind} at byte {self._at}")
        return _SCALARS[kind]

    def _string(self) -> str:
        begin = self._advance(self._scalar("Q"))
        return self._data[begin : self._at].decode("utf-8")

    def _scalar(self, code: str) -> Any:
        layout = "<" + code
        begin = self._advance(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, begin)[0]

    def _advance(self, num_bytes: int) -> int:
        """Step over ``num_bytes``; the position before them."""
        begin = self._at
        if begin + num_bytes > len(self._data):
            raise ValueError(f"the header runs past the end of the file ({len(self._data)} bytes); it is truncated")
        self._at = begin + num_bytes
        return begin
