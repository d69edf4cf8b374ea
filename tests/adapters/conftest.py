from __future__ import annotations

from typing import Any

import pytest

from tests.adapters.helpers import AdaptedModel
from tests.adapters.mixes import CONFIGS, MEMBERS, TestedMix
from tests.fakes.peft_adapters import write_adapter
from tests.fakes.peft_mixes import write_mix
from tests.fakes.tiny_models import write_tiny_llama

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


@pytest.fixture(scope="session")
def mixes(adapted: AdaptedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TestedMix]:
    """Mixes of the adapted model's base, by the names of CONFIGS."""
    found = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        folder = tmp_path_factory.mktemp(name)
        found[name] = TestedMix(folder, write_mix(adapted.base, folder, MEMBERS, seed=seed, **config))
    return found
