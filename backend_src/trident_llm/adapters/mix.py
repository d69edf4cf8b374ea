"""Mix: adapters whose weights a classifier finds per token. MixUse: what a sequence takes of one."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from .adapter import Adapter, BlendTerm
from .classifier import Classifier
from .xlora_config import XLoraConfig

DEFAULT_NAME = "xlora"
"""The mix that the request option ``xlora`` means."""


@dataclass(eq=False)
class Mix:
    """One loaded generation of a mix. Its members have it as a user."""

    name: str
    generation: int
    source: str
    folder: Path
    config: XLoraConfig
    classifier: Classifier
    members: tuple[Adapter, ...]

    @property
    def is_used(self) -> bool:
        """Whether unfinished sequences take it, or one of its members by name."""
        return any(member.num_users > 1 for member in self.members)

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "generation": self.generation,
            "source": self.source,
            "adapters": [member.name for member in self.members],
            "top_k": self.config.top_k,
            "temperature": self.config.temperature,
        }


@dataclass(frozen=True)
class MixUse:
    """A mix with the settings and options that change what it computes."""

    mix: Mix
    top_k: int
    """At least 1."""
    temperature: float
    factor: float
    """On all scalings."""
    freeze_after: int
    """Output tokens after which a sequence's scalings stay; 0: never."""

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        return self.mix.members

    @property
    def terms(self) -> tuple[BlendTerm, ...]:
        return tuple(BlendTerm(member, None) for member in self.mix.members)

    @property
    def spec(self) -> str:
        return f"{self.mix.name}@{self.mix.generation}"

    @property
    def key(self) -> bytes:
        """Different wherever K or V of equal tokens are. As long as that of no blend."""
        return b"mix" + struct.pack(
            "<qqddq", self.mix.generation, self.top_k, self.temperature, self.factor, self.freeze_after
        )

    @property
    def base_key(self) -> bytes:
        """The same for the pass that yields the classifier's input: empty where that is the base model's own."""
        if not self.mix.config.pass_scaling:
            return b""
        return b"pass" + struct.pack("<qqd", self.mix.generation, self.top_k, self.factor)
