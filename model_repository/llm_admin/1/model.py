"""The admin door: commands to the engine of the model ``llm``."""

from trident_llm.server.model import TridentAdminModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
