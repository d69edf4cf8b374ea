"""The door for clients of NVIDIA's vllm_backend: the same tensors, to the engine of the model ``llm``."""

from trident_llm.server.model import TridentPythonModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
