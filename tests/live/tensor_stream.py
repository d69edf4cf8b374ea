"""Requests to llm_vllm as clients of vllm_backend write them: a tensor for each input, all responses as they came."""

from __future__ import annotations

import json
import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.live.addresses import Addresses

OUTPUT_TYPES = {
    "text_output": np.object_,
    "finish_reason": np.object_,
    "cumulative_logprob": np.float32,
    "logprobs": np.object_,
    "num_input_tokens": np.uint32,
    "num_output_tokens": np.uint32,
}
"""Outputs of vllm_backend, as tritonclient hands them over."""


@dataclass(frozen=True)
class Response:
    """One response on a gRPC stream: tensors, or an error."""

    request_id: str = ""
    is_final: bool = True
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    error: InferenceServerException | None = None

    def text(self, name: str = "text_output") -> str:
        """Of a tensor with one element."""
        (value,) = self.tensors[name]
        return value.decode()


def tensor(name: str, values: Sequence[object]) -> grpcclient.InferInput:
    """A vector; strings become bytes."""
    array = np.array([value.encode() if isinstance(value, str) else value for value in values])
    if array.dtype.kind == "S":
        array = array.astype(np.object_)
    made = grpcclient.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def inputs_of(
    prompt: str, sampling_parameters: Mapping[str, object] | None = None, **flags: bool | None
) -> list[grpcclient.InferInput]:
    """The inputs of one request. ``flags`` that are None are left out."""
    inputs = [tensor("text_input", [prompt])]
    if sampling_parameters is not None:
        inputs.append(tensor("sampling_parameters", [json.dumps(sampling_parameters)]))
    return inputs + [tensor(name, [value]) for name, value in flags.items() if value is not None]


class TensorStream:
    """One gRPC stream that carries any number of requests to one model."""

    def __init__(self, server: Addresses, model: str = "llm_vllm") -> None:
        self._model = model
        self._client = server.grpc_client()
        self._responses: queue.SimpleQueue[Response] = queue.SimpleQueue()
        self._client.start_stream(self._receive)

    def __enter__(self) -> TensorStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def submit(
        self,
        inputs: list[grpcclient.InferInput],
        request_id: str = "",
        *,
        outputs: Sequence[str] = (),
        parameters: Mapping[str, object] | None = None,
    ) -> None:
        """``outputs``: those to ask for by name; none: all there are."""
        wanted = [grpcclient.InferRequestedOutput(name) for name in outputs] or None
        self._client.async_stream_infer(
            self._model, inputs, request_id=request_id, outputs=wanted, parameters=dict(parameters or {})
        )

    def next(self, timeout: float = 30.0) -> Response:
        return self._responses.get(timeout=timeout)

    def answer(self, inputs: list[grpcclient.InferInput], **options: Any) -> Response:
        """The one response to a request that does not stream, or its error. ``options``: of ``submit``."""
        self.submit(inputs, **options)
        response = self.next()
        assert response.is_final and self.is_silent
        return response

    @property
    def is_silent(self) -> bool:
        return self._responses.empty()

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)

    def _receive(self, result: grpcclient.InferResult | None, error: InferenceServerException | None) -> None:
        if result is None:
            self._responses.put(Response(error=error))
            return
        response = result.get_response()
        tensors = {output.name: result.as_numpy(output.name) for output in response.outputs}
        is_final = response.parameters["triton_final_response"].bool_param
        self._responses.put(Response(response.id, is_final, tensors))
