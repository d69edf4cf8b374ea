"""Trident: serve large language models from NVIDIA Triton Inference Server, or from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import EngineConfig

if TYPE_CHECKING:
    from .library import Engine

__all__ = ["Engine", "EngineConfig"]


def __getattr__(name: str) -> Any:
    # The doors import this package in every server process: only those who use Engine pay for PyTorch.
    if name == "Engine":
        from .library import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
