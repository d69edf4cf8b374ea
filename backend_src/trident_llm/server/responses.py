"""Responses of the Triton server: output tensors from outputs, and errors with their codes.

The one place where errors of this project become errors of the server.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from ..errors import EngineFailed, TridentError
from ..generation import Generation, logprobs_json
from .delivery import Reply

logger = logging.getLogger(__name__)

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def error_response(error: Exception) -> Any:
    """A response that carries ``error``; one that is not of this project becomes ``EngineFailed`` and is logged."""
    if not isinstance(error, TridentError):
        logger.error("a request failed", exc_info=error)
        # Its own text may name files of this machine.
        error = EngineFailed(f"unexpected {type(error).__name__}; the server's log says more")
    code = getattr(pb_utils.TritonError, error.code, pb_utils.TritonError.INTERNAL)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))


class ResponseBuilder:
    """Builds the responses of one generation door."""

    def __init__(self, *, batched: bool) -> None:
        """``batched``: outputs have a leading batch dimension of 1, because the model has a max_batch_size."""
        self._batched = batched

    def build(self, generation: Generation, reply: Reply) -> Any:
        """Tensors of n elements, one per sample: text_output, and the others that the request asks for.
        ``num_input_tokens`` and ``num_cached_tokens`` have one element."""
        if reply.error is not None:
            return error_response(reply.error)
        options, outputs = generation.options, reply.outputs
        prefix = "" if options.exclude_input_in_output else generation.prompt
        tensors = [self._strings("text_output", [prefix + output.text for output in outputs])]
        if options.return_finish_reason:
            tensors.append(self._strings("finish_reason", [str(output.finish_reason) for output in outputs]))
        if options.return_cumulative_logprob:
            values = [output.cumulative_logprob or 0.0 for output in outputs]
            tensors.append(self._tensor("cumulative_logprob", values, np.float32))
        if options.return_logprobs:
            tensors.append(self._strings("logprobs", [logprobs_json(output.logprobs) for output in outputs]))
        if options.return_num_input_tokens:
            tensors.append(self._tensor("num_input_tokens", [outputs[0].num_input_tokens], np.uint32))
        if options.return_num_output_tokens:
            counts = [len(output.token_ids) for output in outputs]
            tensors.append(self._tensor("num_output_tokens", counts, np.uint32))
        if options.return_num_cached_tokens:
            tensors.append(self._tensor("num_cached_tokens", [outputs[0].num_cached_tokens], np.uint32))
        if options.return_scalings:
            tensors.append(self._strings("scalings", [json.dumps(output.scalings) for output in outputs]))
        if options.return_layer_scalings:
            texts = [json.dumps(output.layer_scalings) for output in outputs]
            tensors.append(self._strings("layer_scalings", texts))
        return pb_utils.InferenceResponse(output_tensors=tensors)

    def _strings(self, name: str, values: Sequence[str]) -> Any:
        return self._tensor(name, [value.encode() for value in values], np.object_)

    def _tensor(self, name: str, values: Sequence[object], dtype: type) -> Any:
        array: np.ndarray = np.array(values, dtype=dtype)
        return pb_utils.Tensor(name, array[np.newaxis] if self._batched else array)
