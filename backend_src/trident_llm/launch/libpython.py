"""Finds the shared library of the running Python, which the Triton server's Python backend links.

scripts/environment.sh also runs this file by itself, so it imports the standard library only.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path


def find_libpython() -> Path | None:
    """The path of libpython3.X.so.1.0; None when this Python came without it."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    folders = [Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib"), Path(sys.base_prefix) / "lib"]
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    candidates = [candidate for folder in folders for candidate in (folder / name, folder / multiarch / name)]
    return next((candidate for candidate in candidates if candidate.exists()), None)


if __name__ == "__main__":
    sys.exit(0 if find_libpython() else 1)
