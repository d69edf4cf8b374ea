"""What the engine does for the commands of ``llm_admin`` that are about adapters."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ..commands import check_arguments
from ..errors import BadRequest, TridentError

if TYPE_CHECKING:
    from .sources import AdapterSources
    from .store import AdapterStore


class AdapterCommands:
    """``store`` is None where the settings leave no room for adapters."""

    def __init__(self, store: AdapterStore | None, sources: AdapterSources) -> None:
        self._store = store
        self._sources = sources

    def run(self, command: str, arguments: Mapping[str, Any]) -> Future[dict[str, Any]]:
        """Begin; between steps. The future holds the result, or the error."""
        result: Future[dict[str, Any]] = Future()
        try:
            check_arguments(command, arguments)
            if self._store is None:
                raise BadRequest(
                    f"{command}: this engine has no room for adapters; set adapters, adapter_root or allow_hub_adapters"
                )
            if command == "load_adapter":
                return self._load(self._store, **arguments)
            if command == "load_xlora":
                return self._load_mix(self._store, **arguments)
            if command == "unload_adapter":
                result.set_result(self._store.unload(**arguments))
            else:
                result.set_result(
                    {
                        "adapters": self._store.describe(),
                        "mixes": self._store.mixes.describe(),
                        "slots": self._store.slots.num_slots,
                    }
                )
        except TridentError as error:
            result.set_exception(error)
        return result

    def _load_mix(self, store: AdapterStore, path: str, name: str = "xlora") -> Future[dict[str, Any]]:
        return store.mixes.load(name, functools.partial(self._sources.find, path), path)

    def _load(self, store: AdapterStore, name: str, path: str, pinned: bool = False) -> Future[dict[str, Any]]:
        return store.load(name, functools.partial(self._sources.find, path), path, pinned=pinned)
