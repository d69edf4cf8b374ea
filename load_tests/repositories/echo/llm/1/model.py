"""The comparison of soak.py: each execute sends every sequence one more word, and keeps nothing of those that ended.

What Trident refuses is refused here, too: errors take other ways through the server than answers.
"""

import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils

from trident_llm.errors import BadRequest
from trident_llm.options import RequestOptions
from trident_llm.protocol import Limits
from trident_llm.server.model_config import complete_generation_config

STEP_SECONDS = 0.004
MAX_PROMPT_CHARS = 4096
LIMITS = Limits(max_n=16, max_stop_strings=16, max_logprobs=20, max_prompt_bytes=2**22)
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """One live sequence per correlation id; a null request (id 0) fills an empty slot."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        return complete_generation_config(auto_complete_model_config)

    def initialize(self, args):
        self._left = {}

    def execute(self, requests):
        requests = [request for request in requests if request.correlation_id() and self._admit(request)]
        time.sleep(STEP_SECONDS)
        # A cancelled sequence never comes back: strategy direct carries every one that lives.
        self._left = {request.correlation_id(): self._left[request.correlation_id()] - 1 for request in requests}
        for request in requests:
            self._send(request, is_final=self._left[request.correlation_id()] <= 0)

    def _admit(self, request):
        """Whether ``request`` lives; a new one that is not allowed gets an error instead."""
        if request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            try:
                self._left[request.correlation_id()] = check(request).max_tokens or 16
            except BadRequest as error:
                refusal = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                request.get_response_sender().send(pb_utils.InferenceResponse(error=refusal), flags=FINAL)
                return False
        return True

    def _send(self, request, is_final):
        options = options_of(request)
        if is_final or options.get("stream"):
            words = [[b"word "] * options.get("n", 1)]
            response = pb_utils.InferenceResponse([pb_utils.Tensor("text_output", np.array(words, dtype=np.object_))])
            request.get_response_sender().send(response, flags=FINAL if is_final else 0)
        if not is_final:
            request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)


def check(request):
    """The options of ``request``. Raises ``BadRequest``."""
    options = RequestOptions.parse(options_of(request), limits=LIMITS, max_model_len=MAX_PROMPT_CHARS, vocab_size=1000)
    prompt = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)[0]
    if not 0 < len(prompt or options.messages or "") <= MAX_PROMPT_CHARS:
        raise BadRequest("text_input: empty or too long")
    return options


def options_of(request):
    return json.loads(request.parameters() or "{}")
