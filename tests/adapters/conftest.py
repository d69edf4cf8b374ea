from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.peft_adapters import write_adapter
from tests.fakes.tiny_models import write_tiny_llama


@dataclass(frozen=True)
class AdaptedModel:
    """A small random model on disk with four adapters that PEFT wrote, and PEFT's models of them."""

    folder: Path
    base: Any
    root: Path
    """Below it lie a, b, c and d."""
    oracles: dict[str, Any]

    def path(self, name: str) -> Path:
        return self.root / name


ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 4},
    "b": {"r": 8, "use_rslora": True, "targets": ("q_proj", "v_proj")},
    "c": {"r": 5, "use_dora": True},
    "d": {"r": 4, "targets": ("gate_proj", "up_proj", "down_proj")},
}


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    import torch
    from transformers import AutoModelForCausalLM

    folder = write_tiny_llama(tmp_path_factory.mktemp("base"))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    root = tmp_path_factory.mktemp("adapters")
    oracles = {
        name: write_adapter(base, root / name, seed=index, **config)
        for index, (name, config) in enumerate(ADAPTERS.items())
    }
    return AdaptedModel(folder, base, root, oracles)
