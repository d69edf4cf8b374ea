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
def smollm2(smollm2_gguf: Path, smollm2_oracle: Any, smollm2_folder: Path) -> Smollm2:
    from transformers import AutoTokenizer

    return Smollm2(
        gguf=smollm2_gguf,
        model=smollm2_oracle,
        tokenizer=AutoTokenizer.from_pretrained(smollm2_folder),
        long_text=(Path(__file__).parents[2] / "LICENSE").read_text(),
    )
