"""What the doors use of ``triton_python_backend_utils``, the module that exists inside the server's stub only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = 1
TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
TRITONSERVER_REQUEST_RELEASE_RESCHEDULE = 2


class TritonModelException(Exception):
    """What calls into the server raise."""


@dataclass
class TritonError:
    INTERNAL: ClassVar[int] = 1
    NOT_FOUND: ClassVar[int] = 2
    INVALID_ARG: ClassVar[int] = 3
    UNAVAILABLE: ClassVar[int] = 4
    CANCELLED: ClassVar[int] = 7

    text: str
    code: int = INTERNAL


@dataclass
class Tensor:
    tensor_name: str
    array: np.ndarray

    def name(self) -> str:
        return self.tensor_name

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    @property
    def text(self) -> str:
        (tensor,) = [tensor for tensor in self.output_tensors if tensor.name() == "text_output"]
        return str(tensor.array.reshape(-1)[0].decode())


@dataclass
class Sender:
    """Collects responses; ``cancelled`` is what the client did."""

    responses: list[InferenceResponse] = field(default_factory=list)
    is_final: bool = False
    cancelled: bool = False
    broken: bool = False

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        assert not self.is_final, "a response after the final one"
        if self.broken:
            raise TritonModelException("the response could not be sent")
        self.responses.append(response)
        self.is_final = bool(flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        return self.cancelled

    @property
    def text(self) -> str:
        return "".join(response.text for response in self.responses)


@dataclass
class Request:
    """One request as ``execute`` sees it."""

    prompt: str | bytes = ""
    sequence: int = 0
    starts: bool = False
    options: dict[str, object] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    timeout_us: int = 0
    client_id: str = ""
    trace_context: str | None = None
    """Of the server's own span."""
    sender: Sender = field(default_factory=Sender)
    rescheduled: bool = False

    def inputs(self) -> list[Tensor]:
        data = self.prompt if isinstance(self.prompt, bytes) else self.prompt.encode()
        return [Tensor("text_input", np.array([[data]], dtype=np.object_)), *self.tensors]

    def parameters(self) -> str:
        return json.dumps(self.options) if self.options else ""

    def request_id(self) -> str:
        return self.client_id

    def trace(self) -> Request:
        return self

    def get_context(self) -> str | None:
        return self.trace_context

    def timeout(self) -> int:
        return self.timeout_us

    def correlation_id(self) -> int:
        return self.sequence

    def flags(self) -> int:
        return TRITONSERVER_REQUEST_FLAG_SEQUENCE_START if self.starts else 0

    def get_response_sender(self) -> Sender:
        return self.sender

    def set_release_flags(self, flags: int) -> None:
        self.rescheduled = flags == TRITONSERVER_REQUEST_RELEASE_RESCHEDULE


@dataclass
class Metric:
    current: float = 0.0

    def set(self, value: float) -> None:
        self.current = value

    def increment(self, value: float) -> None:
        assert value > 0
        self.current += value

    def value(self) -> float:
        return self.current


class MetricFamily:
    """As in the server, values live as long as a family object that made them, whatever others refer to them."""

    GAUGE, COUNTER = "gauge", "counter"
    metrics: ClassVar[dict[str, Metric]] = {}
    num_alive: ClassVar[int] = 0

    def __init__(self, name: str, description: str, kind: str) -> None:
        assert description and kind in (self.GAUGE, self.COUNTER)
        MetricFamily.num_alive += 1
        self._name = name
        self._made: dict[str, Metric] = {}

    def __del__(self) -> None:
        MetricFamily.num_alive -= 1
        for name, metric in self._made.items():
            if self.metrics.get(name) is metric:
                del self.metrics[name]

    def Metric(self, labels: dict[str, str]) -> Metric:
        others = {name: value for name, value in labels.items() if name != "engine"}
        assert labels == {"engine": "llm", **others}
        labelled = "".join(f"{{{name}={value}}}" for name, value in others.items())
        name = self._name + labelled
        return self._made.setdefault(name, self.metrics.setdefault(name, Metric()))


def get_input_tensor_by_name(request: Request, name: str) -> Any:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)
