"""Keeps the memory of a process that runs for months from growing with what it has seen."""

from __future__ import annotations

import gc
import os

ONEDNN_CACHE_ENTRIES = "64"
"""Each is a matrix product of one shape. oneDNN and PyTorch's layer above it keep 1,024 each unless told otherwise, at
half a MB: half a GB after some hours of requests of all lengths. 64 cost no time that could be measured."""
_ONEDNN_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_onednn_caches() -> None:
    """Must come before the first matrix product. Variables that the user has set are left alone."""
    for variable in _ONEDNN_VARIABLES:
        os.environ.setdefault(variable, ONEDNN_CACHE_ENTRIES)


def freeze_loaded_objects() -> None:
    """Take everything that is there now out of garbage collection: walking all modules would hold up every stream.

    The second collection tells Python how little is left to walk: it puts full collections off until the number of
    new objects is a quarter of those that the last one has seen, and the garbage of thousands of requests piles up.
    """
    gc.collect()
    gc.freeze()
    gc.collect()
