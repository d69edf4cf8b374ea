"""What requests did with each adapter and mix, for as many names as metrics may have. Knows no files and no tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..adapters.spec import parse_spec
from ..metrics_catalog import MAX_ADAPTERS, OTHER_ADAPTERS


@dataclass(eq=False)
class AdapterUsage:
    """Sequences hold on to theirs, so a token is an addition."""

    requests: int = 0
    generated_tokens: int = 0


class AdapterUsages:
    """By name: those that are loaded or still run, the first ``limit`` of them; all others share one."""

    def __init__(self, limit: int = MAX_ADAPTERS) -> None:
        self._limit = limit
        self._by_name: dict[str, AdapterUsage] = {}
        self._others = AdapterUsage()

    def keep(self, names: Iterable[str]) -> None:
        """Follow these from now on, and forget all others."""
        wanted = dict.fromkeys(names)
        self._by_name = {name: usage for name, usage in self._by_name.items() if name in wanted}
        for name in wanted:
            if len(self._by_name) < self._limit:
                self._by_name.setdefault(name, AdapterUsage())

    def of(self, spec: str) -> tuple[AdapterUsage, ...]:
        """Those of what a request takes, each once; ``spec`` as blends and mixes have it."""
        names = [term.name for term in parse_spec(spec, generations=True)]
        return tuple(dict.fromkeys(self._by_name.get(name, self._others) for name in names))

    def clear(self) -> None:
        """Begin at 0, with the same names. No sequence may be running."""
        for usage in (*self._by_name.values(), self._others):
            usage.requests = usage.generated_tokens = 0

    def to_dict(self) -> dict[str, dict[str, int]]:
        """By name, that of all others last."""
        return {
            name: {"requests": usage.requests, "generated_tokens": usage.generated_tokens}
            for name, usage in (*self._by_name.items(), (OTHER_ADAPTERS, self._others))
        }
