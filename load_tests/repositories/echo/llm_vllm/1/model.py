"""The comparison of soak.py for the other door: a thread per request sends its words, one response each."""

import json
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

from trident_llm.server.model_config import complete_generation_config

STEP_SECONDS = 0.004


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        return complete_generation_config(auto_complete_model_config)

    def execute(self, requests):
        for request in requests:
            options = json.loads(request.parameters() or "{}")
            stream = pb_utils.get_input_tensor_by_name(request, "stream")
            streams = stream is not None and bool(stream.as_numpy().reshape(-1)[0])
            count = options.get("max_tokens", 16)
            words = [b"word "] * count if streams else [b"word " * count]
            threading.Thread(target=answer, args=(request.get_response_sender(), words), daemon=True).start()


def answer(sender, words):
    for word in words:
        if sender.is_cancelled():
            break
        sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("text_output", np.array([word], dtype=np.object_))]))
        time.sleep(STEP_SECONDS)
    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
