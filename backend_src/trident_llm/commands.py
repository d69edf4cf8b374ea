"""The commands of ``llm_admin`` that change what an engine serves: names and arguments, for doors and engine alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adapters.spec import check_name
from .errors import BadRequest

ADAPTER_COMMANDS: Mapping[str, Mapping[str, type]] = {
    "load_adapter": {"name": str, "path": str, "pinned": bool},
    "unload_adapter": {"name": str},
    "list_adapters": {},
    "load_xlora": {"path": str, "name": str},
}
"""Arguments by command."""
WEIGHTS_COMMANDS: Mapping[str, Mapping[str, type]] = {
    "requantize": {"settings": dict},
    "calibrate": {"action": str, "max_samples": int, "max_length": int, "settings": dict},
    "jobs": {},
    "job": {"id": str},
}
"""Those about the model's weights, and the jobs that change them."""
ENGINE_COMMANDS: Mapping[str, Mapping[str, type]] = {**ADAPTER_COMMANDS, **WEIGHTS_COMMANDS}

_OPTIONAL = frozenset(
    {
        ("load_adapter", "pinned"),
        ("load_xlora", "name"),
        ("calibrate", "max_samples"),
        ("calibrate", "max_length"),
        ("calibrate", "settings"),
    }
)
_WORDS: Mapping[type, str] = {bool: "true or false", str: "a string", int: "an integer", dict: "a JSON object"}


def check_arguments(command: str, arguments: Mapping[str, Any]) -> None:
    """Raise ``BadRequest`` naming an argument that is unknown, missing or of the wrong type."""
    known = ENGINE_COMMANDS[command]
    for name in arguments:
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise BadRequest(f"arguments: {name!r} is not an argument of {command!r}; allowed: {allowed}")
    for name, kind in known.items():
        if name not in arguments and (command, name) not in _OPTIONAL:
            raise BadRequest(f"arguments: {command!r} needs {name!r}")
        if name in arguments and not _is_a(arguments[name], kind):
            raise BadRequest(f"{name}: {arguments[name]!r} is not allowed; give {_WORDS[kind]}")
    if "name" in arguments:
        try:
            check_name(arguments["name"])
        except ValueError as error:
            raise BadRequest(f"name: {error}") from None


def _is_a(value: object, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
