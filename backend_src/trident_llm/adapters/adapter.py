"""Adapter: one loaded generation of a name. Blend: what a sequence takes of one or several."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .adapter_file import AdapterWeights


@dataclass(eq=False)
class Adapter:
    """Loading a name again makes a new generation; the old one lives until its last user ends."""

    name: str
    generation: int
    """Unique among all adapters of an engine, restarts included."""
    source: str
    """What it was loaded from."""
    digest: str
    """Of its files."""
    folder: Path
    """The engine's own copy of its files."""
    rank: int
    num_modules: int
    num_bytes: int
    uses_dora: bool
    mix: str = ""
    """The mix that it came with as a member."""
    pinned: bool = False
    """Its place on the device and in host memory is the last to be given away."""
    weights: AdapterWeights | None = None
    """None while host memory does not hold it."""
    slot: int | None = None
    """On the device."""
    num_users: int = 0
    """Unfinished sequences that take it, and mixes that it is a member of."""

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "generation": self.generation,
            "source": self.source,
            "digest": self.digest,
            "rank": self.rank,
            "modules": self.num_modules,
            "bytes": self.num_bytes,
            "dora": self.uses_dora,
            "mix": self.mix,
            "pinned": self.pinned,
            "in_host_memory": self.weights is not None,
            "slot": self.slot,
            "users": self.num_users,
        }


@dataclass(frozen=True)
class BlendTerm:
    adapter: Adapter
    weight: float | None
    """None: found per token."""


@dataclass(frozen=True)
class Blend:
    """Fixed weights of at least one adapter."""

    freeze_after: ClassVar[int] = 0
    terms: tuple[BlendTerm, ...]
    spec: str
    """The same in words, generations included; see ``spec.parse_spec``."""

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        return tuple(term.adapter for term in self.terms)

    @property
    def key(self) -> bytes:
        """Equal exactly where K and V of equal tokens are."""
        terms = sorted((term.adapter.generation, term.weight or 0.0) for term in self.terms)
        return b"".join(struct.pack("<qd", *term) for term in terms)
