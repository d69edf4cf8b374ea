"""The comparison of bench_delivery.py: each execute computes one step, then sends one token to every sequence."""

import json
import os
import time

import numpy as np
import triton_python_backend_utils as pb_utils

STEP_SECONDS = float(os.environ["TRIDENT_BENCH_STEP_SECONDS"])


class TritonPythonModel:
    """One live sequence per correlation id; a null request (id 0) fills an empty slot."""

    def initialize(self, args):
        self._left = {}

    def execute(self, requests):
        requests = [request for request in requests if request.correlation_id()]
        for request in requests:
            if request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
                self._left[request.correlation_id()] = json.loads(request.parameters())["max_tokens"]
        end = time.monotonic() + STEP_SECONDS
        while time.monotonic() < end:
            pass
        for request in requests:
            self._send(request)

    def _send(self, request):
        left = self._left[request.correlation_id()] - 1
        self._left[request.correlation_id()] = left
        response = pb_utils.InferenceResponse(
            [pb_utils.Tensor("text_output", np.array([[b"t"]], dtype=np.object_))]
        )
        if left:
            request.get_response_sender().send(response)
            request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
        else:
            del self._left[request.correlation_id()]
            request.get_response_sender().send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
