"""The commands of ``llm_admin`` that are about adapters: names, arguments, and what the engine does for them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ..errors import BadRequest, TridentError
from .spec import check_name

if TYPE_CHECKING:
    from .sources import AdapterSources
    from .store import AdapterStore

ADAPTER_COMMANDS: Mapping[str, Mapping[str, type]] = {
    "load_adapter": {"name": str, "path": str, "pinned": bool},
    "unload_adapter": {"name": str},
    "list_adapters": {},
    "load_xlora": {"path": str, "name": str},
}
"""Arguments by command."""
_OPTIONAL = frozenset({("load_adapter", "pinned"), ("load_xlora", "name")})


def check_arguments(command: str, arguments: Mapping[str, Any]) -> None:
    """Raise ``BadRequest`` naming an argument that is unknown, missing or of the wrong type."""
    known = ADAPTER_COMMANDS[command]
    for name in arguments:
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise BadRequest(f"arguments: {name!r} is not an argument of {command!r}; allowed: {allowed}")
    for name, kind in known.items():
        if name not in arguments and (command, name) not in _OPTIONAL:
            raise BadRequest(f"arguments: {command!r} needs {name!r}")
        if name in arguments and not isinstance(arguments[name], kind):
            wanted = "true or false" if kind is bool else "a string"
            raise BadRequest(f"{name}: {arguments[name]!r} is not allowed; give {wanted}")
    if "name" in arguments:
        try:
            check_name(arguments["name"])
        except ValueError as error:
            raise BadRequest(f"name: {error}") from None


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
