"""Where the Triton server is: named by TRIDENT_TRITON_HOME, on PATH, or inside the nvidia-pytriton wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import NotFound
from .libpython import find_libpython

HOME_VARIABLE = "TRIDENT_TRITON_HOME"


@dataclass(frozen=True, kw_only=True)
class ServerHome:
    """One installed Triton server. ``backends`` is None where the binary knows its own backend folder."""

    binary: Path
    backends: Path | None
    libraries: tuple[Path, ...]


def find_server(environ: Mapping[str, str], scratch: Path) -> ServerHome:
    """The server to start. ``scratch`` is an empty private folder for what has to be put together.

    Raises ``NotFound`` saying where it looked and what would help.
    """
    if environ.get(HOME_VARIABLE):
        return _in_folder(Path(environ[HOME_VARIABLE]).expanduser())
    on_path = shutil.which("tritonserver", path=environ.get("PATH", ""))
    if on_path:
        return ServerHome(binary=Path(on_path), backends=None, libraries=())
    spec = importlib.util.find_spec("pytriton")
    for package in (spec.submodule_search_locations or []) if spec else []:
        if (Path(package) / "tritonserver/bin/tritonserver").is_file():
            return _in_wheel(Path(package) / "tritonserver", scratch)
    raise NotFound(
        f"no Triton server: neither {HOME_VARIABLE} is set, nor is tritonserver on PATH, nor is nvidia-pytriton "
        f"installed for {sys.executable}"
    )


def _in_folder(home: Path) -> ServerHome:
    binary = home / "bin/tritonserver"
    if not os.access(binary, os.X_OK):
        raise NotFound(f"{HOME_VARIABLE}={home}: there is no program bin/tritonserver in it")
    backends, libpython = home / "backends", find_libpython()
    # A Python outside /usr has its library where the dynamic loader does not look.
    own = [libpython.parent] if libpython is not None and sys.base_prefix != "/usr" else []
    return ServerHome(
        binary=binary,
        backends=backends if backends.is_dir() else None,
        libraries=tuple(folder for folder in (home / "lib", *own) if folder.is_dir()),
    )


def _in_wheel(home: Path, scratch: Path) -> ServerHome:
    """The wheel keeps one stub per Python version aside: put the Python backend and the right stub into one folder."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise NotFound(f"the Triton server of nvidia-pytriton has no Python backend for Python {version}")
    libpython = find_libpython()
    if libpython is None:
        raise NotFound(
            f"the Triton server needs libpython{version}.so, and {sys.base_prefix} has none; install it "
            f"(Debian and Ubuntu: apt-get install libpython{version}), or use a Python built with --enable-shared"
        )
    python_backend = scratch / "python"
    python_backend.mkdir(parents=True)
    for file in (stub, *(home / "backends/python").iterdir()):
        if file.is_file():
            (python_backend / file.name).symlink_to(file)
    return ServerHome(binary=home / "bin/tritonserver", backends=scratch, libraries=(libpython.parent,))
