"""The comparison of soak.py for questions about statistics: an answer as long as that of an engine."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils

from trident_llm.server.model_config import complete_admin_config

RESULT = json.dumps({f"number_{index}": index for index in range(40)}).encode()


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        return complete_admin_config(auto_complete_model_config)

    def execute(self, requests):
        tensor = pb_utils.Tensor("result", np.array([RESULT], dtype=np.object_))
        return [pb_utils.InferenceResponse([tensor]) for _ in requests]
