"""Requests and responses as the Triton server's protobuf messages. Owns names and shapes of tensors; sends nothing."""

from __future__ import annotations

import json
import numbers
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from .errors import BadRequest, EngineFailed, TridentError, parse_error
from .results import Chunk

Message = Mapping[str, Any]
"""One chat message: at least ``role`` and ``content``."""
OptionValue = bool | int | float | str | Sequence[Any] | Mapping[Any, Any] | None

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A server that restarts is found again soon: retries must not meet gRPC's own backoff of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
ERROR_END_SECONDS = 1.0
"""How long a stream may take to end after an error before it is cancelled."""
_DEFAULT_OPTIONS = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
_LOGPROB_OPTIONS = ("return_logprobs", "return_cumulative_logprob")
_RESERVED = {
    "text_input": "give the prompt as the first argument",
    "messages": "give the messages as the first argument",
    "priority": "the name belongs to the Triton server; use request_priority",
    "sequence_id": "the Triton server sets it",
    "sequence_start": "the Triton server sets it",
    "sequence_end": "the Triton server sets it",
}
_INT64 = range(-(2**63), 2**63)
_64_BITS = range(-(2**63), 2**64)


def check_url(url: str) -> str:
    """``url`` when it is ``host:port``. Raises ``BadRequest``."""
    host, _, port = url.rpartition(":")
    if not host or "/" in url or not port.isdecimal():
        raise BadRequest(f"url: {url!r} is not host:port of the server's gRPC endpoint, such as localhost:8001")
    return url


def generate_request(
    model: str, prompt: str | Sequence[Message], stream: bool, options: Mapping[str, OptionValue]
) -> service_pb2.ModelInferRequest:
    """The request for one generation: ``text_input`` STRING [1, 1], everything else as parameters.

    Lists and mappings travel as JSON. Raises ``BadRequest`` for what cannot travel; whether an option exists, and
    which values it takes, is the server's to say.
    """
    request = service_pb2.ModelInferRequest(model_name=model)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    wanted = {**dict.fromkeys(_DEFAULT_OPTIONS, True), "stream": stream}
    if options.get("logprobs") is not None:
        wanted.update(dict.fromkeys(_LOGPROB_OPTIONS, True))
    for name, value in {**wanted, **options}.items():
        if name in _RESERVED:
            raise BadRequest(f"{name}: not an option: {_RESERVED[name]}")
        _set_option(request, name, value)
    if isinstance(prompt, str):
        _add_text(request, "text_input", prompt, [1, 1])
        return request
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(message, Mapping) for message in prompt):
        raise BadRequest(f"prompt: {type(prompt).__name__} is neither a string nor a list of messages (dicts)")
    _set_option(request, "messages", [dict(message) for message in prompt])
    _add_text(request, "text_input", "", [1, 1])
    return request


def admin_request(model: str, command: str, token: str, arguments: Mapping[str, Any]) -> service_pb2.ModelInferRequest:
    """The request for one administrative command: ``command`` and ``arguments`` (JSON), each STRING [1].

    A ``token`` that is not empty is one of the arguments.
    """
    request = service_pb2.ModelInferRequest(model_name=model)
    _add_text(request, "command", command, [1])
    secret = {"admin_token": token} if token else {}
    _add_text(request, "arguments", _to_json("arguments", {**secret, **arguments}), [1])
    return request


def admin_result(response: service_pb2.ModelInferResponse) -> dict[str, Any]:
    """What the command answered. Raises ``EngineFailed`` when it is no JSON object."""
    texts = _texts(dict(_contents(response)).get("result", b""))
    try:
        result = json.loads(texts[0]) if texts else None
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise EngineFailed(f"the model {response.model_name} did not answer with a JSON object")
    return result


class AnswerDecoder:
    """Turns the responses of one generation into chunks; ``complete`` once the server has said so.

    A response that carries an error sets ``error``. The stream is then to be read to its end, which is near: the
    server keeps the memory of a request whose stream is cancelled after an error.
    """

    def __init__(self) -> None:
        self.complete = False
        self.error: TridentError | None = None
        self._finished: set[int] = set()

    def decode(self, response: service_pb2.ModelStreamInferResponse) -> list[Chunk]:
        """The news of one response: none when it was only a sign of life."""
        if response.error_message:
            self.error = self.error or parse_error(response.error_message)
            return []
        answer = response.infer_response
        final = answer.parameters.get("triton_final_response")
        self.complete = final is not None and final.bool_param
        return [chunk for chunk in _chunks(answer) if self._is_news(chunk)]

    def check_complete(self) -> None:
        """Raise the error that came, or ``EngineFailed`` when the stream ended before its last response."""
        if self.error is not None:
            raise self.error
        if not self.complete:
            raise EngineFailed("the stream ended before the answer did")

    def _is_news(self, chunk: Chunk) -> bool:
        if chunk.index in self._finished:
            return False
        if chunk.finish_reason is not None:
            self._finished.add(chunk.index)
        return bool(chunk.text or chunk.finish_reason or chunk.num_output_tokens)


def _chunks(answer: service_pb2.ModelInferResponse) -> list[Chunk]:
    """One chunk per element of ``text_output``; every other output has one element per sample, or one for all.

    Read by hand, because this is what a token costs its client: tritonclient's ``InferResult`` looks for each output
    among all and makes an array of it.
    """
    columns = {name: _COLUMNS[name](data) for name, data in _contents(answer) if name in _COLUMNS}
    texts = columns.pop("text_output", [])
    return [
        Chunk(text=text, index=index, **{name: _at(values, index) for name, values in columns.items()})
        for index, text in enumerate(texts)
    ]


def _contents(response: service_pb2.ModelInferResponse) -> Iterator[tuple[str, bytes]]:
    """Names of outputs with their contents, which the Triton server sends beside them."""
    return zip([tensor.name for tensor in response.outputs], response.raw_output_contents, strict=True)


def _texts(data: bytes) -> list[str]:
    """Elements of a BYTES tensor: the length of each, in 4 bytes, comes before it."""
    texts, begin = [], 0
    while begin < len(data):
        end = begin + 4 + int.from_bytes(data[begin : begin + 4], "little")
        texts.append(data[begin + 4 : end].decode("utf-8", "replace"))
        begin = end
    return texts


def _reasons(data: bytes) -> list[str | None]:
    return [text if text not in ("", "None") else None for text in _texts(data)]


def _json_values(data: bytes) -> list[Any]:
    return [json.loads(text) for text in _texts(data)]


def _integers(data: bytes) -> list[int]:
    """Elements of a UINT32 tensor."""
    if len(data) == 4:
        return [int.from_bytes(data, "little")]
    return [value for (value,) in struct.iter_unpack("<I", data)]


def _floats(data: bytes) -> list[float]:
    """Elements of an FP32 tensor."""
    return [value for (value,) in struct.iter_unpack("<f", data)]


_COLUMNS: Mapping[str, Callable[[bytes], list[Any]]] = {
    "text_output": _texts,
    "finish_reason": _reasons,
    "num_input_tokens": _integers,
    "num_output_tokens": _integers,
    "num_cached_tokens": _integers,
    "cumulative_logprob": _floats,
    "logprobs": _json_values,
    "scalings": _json_values,
    "layer_scalings": _json_values,
}
"""Outputs of a door that are fields of ``Chunk``, and how their contents are read."""


def _at(values: list[Any], index: int) -> Any:
    """The value of one sample, or the one that all share, or None."""
    if index < len(values):
        return values[index]
    return values[0] if len(values) == 1 else None


def _add_text(request: service_pb2.ModelInferRequest, name: str, text: str, shape: list[int]) -> None:
    tensor = request.inputs.add(name=name, datatype="BYTES", shape=shape)
    tensor.contents.bytes_contents.append(_utf8(name, text).encode())


def _set_option(request: service_pb2.ModelInferRequest, name: str, value: OptionValue) -> None:
    """Set a request parameter of the type that fits; None means not given."""
    if name.startswith("triton_"):
        raise BadRequest(f"{name}: not an option: names that start with triton_ belong to the Triton server")
    if value is None:
        return
    if name == "stop" and isinstance(value, str):
        value = [value]  # as JSON, because a plain string that looks like JSON would be read as JSON
    if isinstance(value, (bool, np.bool_)):
        request.parameters[name].bool_param = bool(value)
    elif isinstance(value, numbers.Integral):
        _set_integer(request, name, int(value))
    elif isinstance(value, numbers.Real):
        request.parameters[name].double_param = float(value)
    elif isinstance(value, str):
        request.parameters[name].string_param = _utf8(name, value)
    elif isinstance(value, (Sequence, Mapping)) and not isinstance(value, bytes):
        request.parameters[name].string_param = _to_json(name, value)
    else:
        raise BadRequest(f"{name}: {type(value).__name__} is not a boolean, number, string, list or mapping")


def _set_integer(request: service_pb2.ModelInferRequest, name: str, value: int) -> None:
    if value not in _64_BITS:
        raise BadRequest(f"{name}: the integer does not fit into 64 bits")
    if value in _INT64:
        request.parameters[name].int64_param = value
    else:
        request.parameters[name].string_param = str(value)  # the server takes numbers as text, too


def _to_json(name: str, value: Any) -> str:
    try:
        return _utf8(name, json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError) as error:
        raise BadRequest(f"{name}: cannot be written as JSON: {error}") from None


def _utf8(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{name}: is not valid text: a lone surrogate at position {error.start}") from None
    return text
