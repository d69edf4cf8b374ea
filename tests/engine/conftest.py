from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Smollm2:
    """SmolLM2-135M-Instruct as transformers has it, in fp32, and a text longer than any prompt of the tests."""

    gguf: Path
    model: Any
    tokenizer: Any
    long_text: str


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Smollm2:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {"pretrained_model_name_or_path": str(smollm2_gguf.parent), "gguf_file": smollm2_gguf.name}
    return Smollm2(
        gguf=smollm2_gguf,
        model=AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32).eval(),
        tokenizer=AutoTokenizer.from_pretrained(**names),
        long_text=(Path(__file__).parents[2] / "LICENSE").read_text(),
    )
