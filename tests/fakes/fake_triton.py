"""A Triton server that speaks gRPC and has no model: each generation does what the script says next.

It implements the calls that clients use (liveness, readiness, ModelInfer for llm_admin, ModelStreamInfer for llm) and
records what it was asked.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

Parameters = dict[str, str | int | float | bool]


@dataclass(frozen=True)
class OutputTensor:
    """A vector of ``count`` elements; ``raw`` is its contents as the server sends them."""

    name: str
    datatype: str
    count: int
    raw: bytes


@dataclass(frozen=True)
class Answer:
    """Send ``tokens`` one by one, each after ``delay`` seconds, then end for ``finish_reason``."""

    tokens: tuple[str, ...] = ("Hello", ", ", "world")
    delay: float = 0.0
    finish_reason: str = "stop"
    first_delay: float = 0.0
    """Before the first token; with ``alive`` an empty response comes first, as a sign of life."""
    alive: bool = False


@dataclass(frozen=True)
class Fail:
    """Send ``tokens``, then the error ``text`` on the stream."""

    text: str
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refuse:
    """End the call with a gRPC status, as a proxy or a server that shuts down does."""

    status: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    details: str = "connection reset"


@dataclass(frozen=True)
class Break:
    """Send ``tokens`` and end the stream without a final response."""

    tokens: tuple[str, ...] = ("Hel",)


@dataclass(frozen=True)
class Hang:
    """Send ``tokens``, then nothing until the client cancels."""

    tokens: tuple[str, ...] = ()


Behaviour = Answer | Fail | Refuse | Break | Hang


@dataclass(frozen=True)
class Generation:
    """What the server was asked, and whether the client gave it up."""

    text_input: str
    shape: tuple[int, ...]
    parameters: Parameters
    served: threading.Event = field(default_factory=threading.Event)
    """Set when the last response is about to go out."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when the call ended before that."""


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A context manager. ``script`` is used up from its front; its last entry serves all further requests."""

    def __init__(
        self, *script: Behaviour, num_input_tokens: int = 4, samples: int = 1, address: str = "127.0.0.1:0"
    ) -> None:
        self.script = list(script) or [Answer()]
        self.num_input_tokens = num_input_tokens
        self.samples = samples
        """Elements of each output, all alike: what option n does in the server."""
        self.generations: list[Generation] = []
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self.results: dict[str, Any] = {"stats": {"running_requests": 1}, "health": {"ready": True}}
        self.has_admin = True
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=64))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.host = address.rpartition(":")[0]
        self.port = self._server.add_insecure_port(address)

    @property
    def url(self) -> str:
        return f"{self.host}:{self.port}"

    def __enter__(self) -> FakeTriton:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=None).wait()

    def ServerLive(self, request, context):
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request, context):
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=request.name == "llm")

    def ModelInfer(self, request, context):
        if request.model_name != "llm_admin" or not self.has_admin:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.model_name}' is not found")
        inputs = {tensor.name: tensor.contents.bytes_contents[0].decode() for tensor in request.inputs}
        self.commands.append((inputs["command"], json.loads(inputs["arguments"])))
        if inputs["command"] not in self.results:
            text = f"[INVALID_ARG] command: {inputs['command']!r} is not one of {', '.join(self.results)}"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        return _response("llm_admin", [_texts("result", json.dumps(self.results[inputs["command"]]))])

    def ModelStreamInfer(self, request_iterator, context):
        for request in request_iterator:
            if request.model_name != "llm":
                text = f"Request for unknown model: '{request.model_name}' is not found"
                yield service_pb2.ModelStreamInferResponse(error_message=text)
                continue
            generation = _generation(request)
            with self._lock:
                self.generations.append(generation)
                behaviour = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            yield from self._perform(behaviour, generation, context)

    def _perform(
        self, behaviour: Behaviour, generation: Generation, context: grpc.ServicerContext
    ) -> Iterator[service_pb2.ModelStreamInferResponse]:
        gone = threading.Event()

        def record_end() -> None:
            gone.set()
            if not generation.served.is_set():
                generation.cancelled.set()

        if not context.add_callback(record_end):
            record_end()
        match behaviour:
            case Refuse(status, details):
                generation.served.set()
                context.abort(status, details)
            case Fail(text, tokens):
                yield from (self._news(token, 1) for token in tokens)
                yield service_pb2.ModelStreamInferResponse(error_message=text)
                # What follows an error is read, too: a server keeps the memory of a stream that is cancelled here.
                if not gone.wait(0.1):
                    generation.served.set()
            case Break(tokens):
                yield from (self._news(token, 1) for token in tokens)
                generation.served.set()
            case Hang(tokens):
                yield from (self._news(token, 1) for token in tokens)
                gone.wait()
            case Answer():
                yield from self._answer(behaviour, generation, gone)

    def _answer(
        self, answer: Answer, generation: Generation, gone: threading.Event
    ) -> Iterator[service_pb2.ModelStreamInferResponse]:
        if answer.alive:
            yield self._news("", 0)
        tokens = answer.tokens
        if not generation.parameters.get("stream"):
            generation.served.set()
            yield self._news("".join(tokens), len(tokens), answer.finish_reason, final=True)
            return
        for position, token in enumerate(tokens):
            if gone.wait(answer.first_delay if position == 0 else answer.delay):
                return
            last = position == len(tokens) - 1
            yield self._news(token, 1, answer.finish_reason if last else "None")
        generation.served.set()
        yield service_pb2.ModelStreamInferResponse(infer_response=_response("llm", [], final=True))

    def _news(
        self, text: str, num_tokens: int, finish_reason: str = "None", *, final: bool = False
    ) -> service_pb2.ModelStreamInferResponse:
        outputs = [
            _texts("text_output", *[text] * self.samples),
            _texts("finish_reason", *[finish_reason] * self.samples),
            _texts("logprobs", *["null"] * self.samples),
            _numbers("num_input_tokens", "UINT32", self.num_input_tokens),
            _numbers("num_output_tokens", "UINT32", *[num_tokens] * self.samples),
            _numbers("cumulative_logprob", "FP32", *[-0.5] * self.samples),
        ]
        return service_pb2.ModelStreamInferResponse(infer_response=_response("llm", outputs, final=final))


def _generation(request: service_pb2.ModelInferRequest) -> Generation:
    tensor = request.inputs[0]
    assert tensor.name == "text_input" and len(request.inputs) == 1
    given = request.parameters.items()
    parameters = {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in given}
    return Generation(tensor.contents.bytes_contents[0].decode(), tuple(tensor.shape), parameters)


def _texts(name: str, *texts: str) -> OutputTensor:
    encoded = [text.encode() for text in texts]
    return OutputTensor(name, "BYTES", len(texts), b"".join(struct.pack("<I", len(item)) + item for item in encoded))


def _numbers(name: str, datatype: str, *values: float) -> OutputTensor:
    kind = {"UINT32": "I", "FP32": "f"}[datatype]
    return OutputTensor(name, datatype, len(values), struct.pack(f"<{len(values)}{kind}", *values))


def _response(model: str, outputs: list[OutputTensor], *, final: bool = False) -> service_pb2.ModelInferResponse:
    response = service_pb2.ModelInferResponse(model_name=model)
    for output in outputs:
        response.outputs.add(name=output.name, datatype=output.datatype, shape=[output.count])
        response.raw_output_contents.append(output.raw)
    response.parameters["triton_final_response"].bool_param = final
    return response
