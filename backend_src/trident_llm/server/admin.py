"""The admin door: one JSON command in, one JSON result out."""

from __future__ import annotations

import hmac
import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from ..commands import ENGINE_COMMANDS, check_arguments
from ..door_board import read_doors
from ..errors import BadRequest
from ..run_directory import RunDirectory
from .engine_client import EngineClient
from .responses import error_response

COMMANDS = ("config", "health", "stats", *ENGINE_COMMANDS)
LOAD_TIMEOUT = 600.0
"""Seconds that loading an adapter may take, a download included. The check of a requantize takes a few at most."""


class AdminDoor:
    """``execute`` of the model ``llm_admin``. The secret, when the engine has one, is ``admin_token`` in arguments."""

    def __init__(self, client: EngineClient, run_directory: RunDirectory) -> None:
        self._client = client
        self._run_directory = run_directory
        self.num_running = 0
        """Requests that are being answered."""

    def execute(self, requests: list[Any]) -> list[Any]:
        self.num_running = len(requests)
        try:
            return [self._respond(request) for request in requests]
        finally:
            self.num_running = 0

    def close(self) -> None:
        """Nothing is kept between two calls."""

    def _respond(self, request: Any) -> Any:
        try:
            result = self._run(_text(request, "command"), _arguments(request))
        except Exception as error:
            return error_response(error)
        text = json.dumps(result).encode()
        return pb_utils.InferenceResponse([pb_utils.Tensor("result", np.array([text], dtype=np.object_))])

    def _run(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self._check_token(arguments.pop("admin_token", ""))
        if command not in COMMANDS:
            raise BadRequest(f"command: {command!r} is not allowed; give one of {', '.join(COMMANDS)}")
        if command in ENGINE_COMMANDS:
            check_arguments(command, arguments)
            return self._client.command(command, arguments, timeout=LOAD_TIMEOUT)
        if arguments:
            raise BadRequest(f"arguments: {sorted(arguments)[0]!r} is not an argument of {command!r}, which has none")
        if command == "health":
            return {"ready": self._client.ready, "engine_restarts": self._client.num_restarts}
        result = self._client.command(command, {})
        if command != "stats":
            return result
        doors = read_doors(self._client.doors_folder)
        return {**result, "engine_restarts": self._client.num_restarts, "doors": doors}

    def _check_token(self, given: object) -> None:
        launch = self._run_directory.read_launch()
        wanted = launch.parameters.get("admin_token", "").strip() if launch is not None else ""
        if wanted and not (isinstance(given, str) and hmac.compare_digest(given.encode(), wanted.encode())):
            raise BadRequest('arguments: "admin_token" is missing or wrong; give the setting admin_token of the engine')


def _arguments(request: Any) -> dict[str, Any]:
    text = _text(request, "arguments") or "{}"
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise BadRequest(f"arguments: not JSON ({error}); give a JSON object") from None
    if not isinstance(arguments, dict):
        raise BadRequest(f"arguments: a JSON {type(arguments).__name__} is not allowed; give a JSON object")
    return arguments


def _text(request: Any, name: str) -> str:
    """A string input; empty when it is left out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return ""
    array = tensor.as_numpy().reshape(-1)
    if array.size != 1:
        raise BadRequest(f"{name}: {array.size} elements are not allowed; give exactly one string")
    try:
        return bytes(array[0]).decode() if isinstance(array[0], bytes) else str(array[0])
    except UnicodeDecodeError:
        raise BadRequest(f"{name}: not valid UTF-8") from None


