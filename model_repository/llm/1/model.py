"""The main door: iterative sequence batching. This model owns the engine."""

from trident_llm.server.model import TridentPythonModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
