"""A stand-in for a second model: returns its input, and shows that it finds the package trident_llm."""

import triton_python_backend_utils as pb_utils

from trident_llm.errors import BadRequest


class TritonPythonModel:
    def execute(self, requests):
        assert BadRequest.code == "INVALID_ARG"
        tensors = [pb_utils.get_input_tensor_by_name(request, "text_input") for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("text_output", t.as_numpy())]) for t in tensors]
