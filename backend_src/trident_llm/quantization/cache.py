"""Quantized parameters on disk, so that a model is quantized once: a folder for each set of weights, settings and text.

A folder holds safetensors files and a manifest with their sizes and checksums, written last; what does not match it
is not used. Knows nothing of how parameters came about.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..kernels.quantized_weight import QuantizedWeight
from .installation import Parameter
from .packing import pack, unpack

_FORMAT = 2
"""Raised whenever files, or what a method computes, change."""
_MANIFEST = "manifest.json"
_FILE_BYTES = 256 << 20
_CHECKSUM_BYTES = 1 << 22
_MAKING = "making-"
_ABANDONED_SECONDS = 86_400
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class DamagedCache(Exception):
    """What lies there is not what was written."""


def cache_root() -> Path:
    """$XDG_CACHE_HOME (~/.cache)/trident/quantized."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trident" / "quantized"


def cache_key(parts: Mapping[str, Any]) -> str:
    """A hash of everything that decides what comes out; values are told apart by their text."""
    text = json.dumps({"format": _FORMAT, **{key: str(value) for key, value in parts.items()}}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def files_identity(files: Sequence[Path]) -> str:
    """A hash that tells files with other content apart: sizes, times of change, and pieces spread over each file.

    Reading all of a large model would take longer than loading what was quantized.
    """
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        with path.open("rb") as file:
            for index in range(_SAMPLES):
                file.seek(index * max(status.st_size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class CacheWriter:
    """Takes parameters as they come and keeps at most one file's worth of them."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError where nothing can be written."""
        self._folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        self._making = Path(tempfile.mkdtemp(prefix=_MAKING, dir=folder.parent))
        self._pending: dict[str, Tensor] = {}
        self._entries: list[dict[str, Any]] = []
        self._files: list[dict[str, Any]] = []

    def add(self, name: str, value: Parameter) -> None:
        """Raises OSError."""
        entry: dict[str, Any] = {"name": name, "file": len(self._files)}
        if isinstance(value, QuantizedWeight):
            entry |= {"shape": value.shape, "bits": value.bits, "group_size": value.group_size}
            entry["activations"] = value.activations
            is_float = value.codes.dtype == torch.float8_e4m3fn
            codes = value.codes.flatten().view(torch.uint8) if is_float else pack(value.codes, value.bits)
            parts = {"codes": codes, "scales": value.scales, "zero_points": pack(value.zero_points, value.bits)}
        else:
            parts = {"values": value}
        self._entries.append(entry)
        self._pending.update({f"{name}:{part}": tensor.cpu().contiguous() for part, tensor in parts.items()})
        if sum(tensor.nbytes for tensor in self._pending.values()) >= _FILE_BYTES:
            self._flush()

    def _flush(self) -> None:
        path = self._making / f"{len(self._files):03}.safetensors"
        save_file(self._pending, path)
        self._files.append({"name": path.name, "bytes": path.stat().st_size, "crc32": _checksum(path)})
        self._pending = {}

    def finish(self, report: Mapping[str, Any]) -> None:
        """Make what was added visible under its name, in place of what may be there. Raises OSError."""
        if self._pending:
            self._flush()
        manifest = {"format": _FORMAT, "files": self._files, "parameters": self._entries, "report": dict(report)}
        (self._making / _MANIFEST).write_text(json.dumps(manifest))
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._making.rename(self._folder)
        except OSError:
            # A folder cannot be renamed over one with files in it: then another process was first.
            self.discard()

    def discard(self) -> None:
        shutil.rmtree(self._making, ignore_errors=True)


class CachedParameters:
    """What a ``CacheWriter`` left in ``folder``. Raises ``DamagedCache`` when it is not whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
            self.report: dict[str, Any] = manifest["report"]
            self._files: list[dict[str, Any]] = manifest["files"]
            self._entries: list[dict[str, Any]] = manifest["parameters"]
            paths = [folder / file["name"] for file in self._files]
            if [path.stat().st_size for path in paths] != [file["bytes"] for file in self._files]:
                raise DamagedCache(f"{folder}: a file is shorter or longer than it was")
            with ThreadPoolExecutor() as pool:
                if list(pool.map(_checksum, paths)) != [file["crc32"] for file in self._files]:
                    raise DamagedCache(f"{folder}: a file is not as it was written")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedCache(f"{folder}: {error!r}") from error

    def parameters(self, device: torch.device) -> Iterator[tuple[str, Parameter]]:
        """All of them, in the order in which they were added, on ``device``."""
        for index, file in enumerate(self._files):
            with safe_open(self._folder / file["name"], framework="pt") as tensors:
                for entry in self._entries:
                    if entry["file"] == index:
                        yield entry["name"], _parameter(tensors, entry, device)


def open_cache(folder: Path, progress: Callable[[str], None]) -> CachedParameters | None:
    """What lies in ``folder``, if it is whole; ``progress`` is told if it is not."""
    if not (folder / _MANIFEST).exists():
        return None
    try:
        return CachedParameters(folder)
    except DamagedCache as error:
        progress(f"quantized weights on disk are damaged and made anew: {error}")
        return None


def _remove_abandoned(root: Path) -> None:
    """Remove what a process was making that was killed meanwhile."""
    for path in root.glob(_MAKING + "*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path)


def _parameter(tensors: Any, entry: Mapping[str, Any], device: torch.device) -> Parameter:
    def read(part: str) -> Tensor:
        return tensors.get_tensor(f"{entry['name']}:{part}").to(device, copy=True)

    if "bits" not in entry:
        return read("values")
    bits, scales, codes = entry["bits"], read("scales"), read("codes")
    num_outputs, num_inputs = entry["shape"]
    is_float = entry["activations"] == "fp8"
    return QuantizedWeight(
        codes=(
            codes.view(torch.float8_e4m3fn).view(num_outputs, num_inputs)
            if is_float
            else unpack(codes, bits, (num_outputs, num_inputs))
        ),
        scales=scales,
        zero_points=unpack(read("zero_points"), bits, tuple(scales.shape)),
        bits=bits,
        group_size=entry["group_size"],
        activations=entry["activations"],
    )


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_CHECKSUM_BYTES):
            value = zlib.crc32(block, value)
    return value
