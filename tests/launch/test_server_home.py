"""Which Triton server is started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trident_llm.errors import NotFound
from trident_llm.launch import server_home
from trident_llm.launch.libpython import find_libpython
from trident_llm.launch.server_home import find_server


def make_program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_named_home_comes_first(tmp_path: Path) -> None:
    binary = make_program(tmp_path / "home/bin/tritonserver")
    make_program(tmp_path / "other/tritonserver")
    (tmp_path / "home/backends").mkdir()
    (tmp_path / "home/lib").mkdir()
    environ = {"TRIDENT_TRITON_HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "other")}
    home = find_server(environ, tmp_path / "scratch")
    assert (home.binary, home.backends) == (binary, tmp_path / "home/backends")
    assert home.libraries[0] == tmp_path / "home/lib"


def test_a_named_home_without_a_server_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=f"TRIDENT_TRITON_HOME={tmp_path}: there is no program bin/tritonserver"):
        find_server({"TRIDENT_TRITON_HOME": str(tmp_path)}, tmp_path / "scratch")


def test_a_server_on_path_keeps_its_own_backends(tmp_path: Path) -> None:
    binary = make_program(tmp_path / "bin/tritonserver")
    home = find_server({"PATH": f"/no/such:{binary.parent}"}, tmp_path / "scratch")
    assert (home.binary, home.backends, home.libraries) == (binary, None, ())


def test_the_wheel_serves_otherwise(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    home = find_server({"PATH": str(tmp_path)}, scratch)
    assert home.binary.is_file() and home.backends == scratch
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"/{version}/" in str((scratch / "python/triton_python_backend_stub").resolve())
    assert (scratch / "python/libtriton_python.so").is_file()
    assert (scratch / "python/triton_python_backend_utils.py").is_file()
    assert list(home.libraries[0].glob(f"libpython{version}.so*"))


def test_a_python_without_its_library_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_home, "find_libpython", lambda: None)
    with pytest.raises(NotFound, match=r"libpython3\.\d+\.so.*apt-get install"):
        find_server({"PATH": str(tmp_path)}, tmp_path / "scratch")


def test_the_running_python_has_its_library() -> None:
    library = find_libpython()
    assert library is not None and library.name == f"libpython3.{sys.version_info.minor}.so.1.0"
