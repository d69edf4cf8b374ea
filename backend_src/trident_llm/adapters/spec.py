"""What a request writes as ``adapter``: one name, or several with weights. Knows no files and no tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

MAX_WEIGHT = 10.0
NAME_RULE = "1 to 200 letters, digits or any of . _ - /, the first a letter or digit, without .."
SPEC_RULE = f"NAME, or a blend NAME:WEIGHT,NAME:WEIGHT,... with weights from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_WEIGHT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_GENERATION = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class AdapterTerm:
    """``weight`` times the adapter ``name``."""

    name: str
    weight: float = 1.0
    generation: int | None = None
    """None: the one that is loaded now."""

    def __str__(self) -> str:
        generation = "" if self.generation is None else f"@{self.generation}"
        return f"{self.name}{generation}:{self.weight!r}"


def check_name(name: object) -> str:
    """``name`` if it can name an adapter. Raises ``ValueError`` that says what can."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"{str(name)[:80]!r} is no name of an adapter; give {NAME_RULE}")
    return name


def parse_spec(text: str, *, generations: bool = False) -> tuple[AdapterTerm, ...]:
    """The terms of ``text``: ``a``, ``a:0.7,b:0.3``; with ``generations`` also ``a@3:0.7``. Empty for empty text.

    Raises ``ValueError`` that says what is wrong.
    """
    if not text.strip():
        return ()
    terms = tuple(_parse_term(part.strip(), generations) for part in text.split(","))
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} comes twice")
    return terms


def format_spec(terms: tuple[AdapterTerm, ...]) -> str:
    """What ``parse_spec`` with ``generations`` reads back."""
    return ",".join(map(str, terms))


def parse_adapter_list(text: str) -> dict[str, str]:
    """Paths by name, from ``name=path, name=path``. Raises ``ValueError`` that says what is wrong."""
    paths: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, path = (word.strip() for word in part.partition("="))
        if not equals or not path:
            raise ValueError(f"{part[:200]!r} is not of the form name=path")
        if check_name(name) in paths:
            raise ValueError(f"{name!r} comes twice")
        paths[name] = path
    return paths


def _parse_term(part: str, generations: bool) -> AdapterTerm:
    name, colon, weight_text = part.partition(":")
    at = generation = ""
    if generations:
        name, at, generation = name.partition("@")
    if at and not _GENERATION.fullmatch(generation):
        raise ValueError(f"{generation[:80]!r} is no generation")
    weight = 1.0
    if colon:
        if not _WEIGHT.fullmatch(weight_text.strip()):
            raise ValueError(f"{weight_text[:80]!r} is no weight")
        weight = float(weight_text)
        if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
            raise ValueError(f"the weight {weight_text.strip()[:80]} is out of range")
    return AdapterTerm(check_name(name.strip()), weight, int(generation) if at else None)
