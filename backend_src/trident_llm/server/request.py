"""From a request of the Triton server to a generation: prompt, options from tensors and parameters, timeout.

The same for both generation doors. It knows neither scheduling nor delivery.
"""

from __future__ import annotations

import itertools
import json
import uuid
from pathlib import Path
from typing import Any

from ..errors import BadRequest
from ..generation import Generation, decode_prompt
from ..options import Defaults, RequestOptions
from ..protocol import Welcome
from ..text import Tokenizer
from .tracing import TRACE_HEADERS

PROMPT_INPUT = "text_input"
_UNSUPPORTED = {
    "image": "this server takes text only",
    "embedding_request": "this server generates text only",
}
"""Inputs of vllm_backend that have no counterpart here, and what a request for them is told."""
_MICROSECONDS = 1_000_000


class RequestReader:
    """Makes a ``Generation`` of each request that reaches one door."""

    def __init__(self, welcome: Welcome, defaults: Defaults) -> None:
        self._welcome = welcome
        self._defaults = defaults
        self._tokenizer = Tokenizer(Path(welcome.tokenizer_folder))
        self._prefix = uuid.uuid4().hex[:16]
        self._numbers = itertools.count()

    def read(self, request: Any) -> Generation:
        """The generation that ``request`` asks for, not submitted yet. Raises ``BadRequest`` naming what is wrong."""
        parameters = _parameters(request)
        headers = {name: str(parameters.pop(name)) for name in TRACE_HEADERS if name in parameters}
        raw: dict[str, object] = {} if self._defaults.carrier_wins else parameters
        prompt = ""
        for tensor in request.inputs():
            if tensor.name() == PROMPT_INPUT:
                prompt = decode_prompt(_bytes(PROMPT_INPUT, _single(PROMPT_INPUT, tensor)))
            else:
                raw[tensor.name()] = _tensor_value(tensor)
        options = RequestOptions.parse(
            raw,
            limits=self._welcome.limits,
            max_model_len=self._welcome.max_model_len,
            vocab_size=self._welcome.vocab_size,
            defaults=self._defaults,
            beneath=parameters if self._defaults.carrier_wins else None,
        )
        request_id = f"{self._prefix}-{next(self._numbers)}"
        return Generation(
            request_id,
            prompt,
            options,
            self._tokenizer,
            self._welcome,
            client_id=request.request_id(),
            trace_context=_trace_context(request, headers) if self._welcome.otlp_endpoint else None,
        )


def _parameters(request: Any) -> dict[str, object]:
    """Request parameters as options. The protocol's own timeout, in microseconds, becomes the option ``timeout``."""
    text = request.parameters()
    values: dict[str, object] = json.loads(text) if text else {}
    options = {key: value for key, value in values.items() if not key.startswith("triton_")}
    if request.timeout():
        options.setdefault("timeout", request.timeout() / _MICROSECONDS)
    return options


def _trace_context(request: Any, headers: dict[str, str]) -> dict[str, str] | None:
    """The server's own span when it traces the request, else what its client sent; None without either."""
    context = request.trace().get_context()
    return (json.loads(context) if context else headers) or None


def _tensor_value(tensor: Any) -> object:
    """The value of an input that stands for an option of the same name."""
    name = tensor.name()
    if name in _UNSUPPORTED:
        raise BadRequest(f"{name}: not supported; {_UNSUPPORTED[name]}")
    value = _single(name, tensor)
    if isinstance(value, (bytes, str)):
        return decode_prompt(_bytes(name, value), name)
    return value.item()


def _single(name: str, tensor: Any) -> Any:
    array = tensor.as_numpy()
    if array.size != 1:
        raise BadRequest(f"{name}: shape {list(array.shape)} is not allowed; give exactly one element per request")
    return array.reshape(-1)[0]


def _bytes(name: str, value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    raise BadRequest(f"{name}: a tensor of {type(value).__name__} is not allowed; give a BYTES tensor")
