"""What a loaded model computes is what its quantized weights say; transformers is the oracle of everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.fakes.tiny_models import write_tiny_llama
from trident_llm import EngineConfig
from trident_llm.engine.kv_cache import KVCache
from trident_llm.engine.loading import LoadedModel, load_model
from trident_llm.kernels.quantized_weight import QuantizedWeight
from trident_llm.quantization.cache import CachedParameters, cache_root
from trident_llm.quantization.modules import HEAD, model_modules

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def oracle_of(folder: Path, model: LoadedModel) -> Any:
    """transformers' model of the folder with the parameters that the cache holds, turned back into float32."""
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own = dict(oracle.named_parameters())
    parts = {module.name: module.parts for module in model_modules(model.config)}
    (kept,) = cache_root().iterdir()
    for name, value in CachedParameters(kept).parameters(CPU):
        owner, _, kind = name.rpartition(".")
        tensor = value.dequantize() if isinstance(value, QuantizedWeight) else value
        if kind not in ("weight", "bias"):
            continue
        if name == f"{HEAD}.weight" and model.config.tie_word_embeddings:
            oracle.lm_head.weight = torch.nn.Parameter(tensor)
            continue
        for part in parts.get(owner, (owner,)):
            target = own[f"{part}.{kind}"]
            target.data, tensor = tensor[: len(target)], tensor[len(target) :]
    return oracle


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"isq_method": "rtn"},
        {"isq_method": "rtn", "isq_bits": "8"},
        {"isq_method": "gptq", "isq_bits": "5"},
        {"isq_method": "gptq", "isq_bits": "6", "isq_group_size": "channel"},
        {"isq_method": "awq", "isq_layers": "0=gptq:4:64; .*o_proj=none; lm_head=none"},
    ],
)
def test_logits_are_those_of_the_dequantized_model(tmp_path, settings, tied):
    folder = write_tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    fixed = {"model": str(folder), "device": "cpu", "dtype": "fp32", "num_threads": "1", "max_num_blocks": "32"}
    calibration = {"isq_calibration_samples": "8", "isq_calibration_length": "64", "max_model_len": "256"}
    model = load_model(EngineConfig.from_parameters({**fixed, **calibration, **settings}), lambda text: None)
    tokens = torch.randint(0, 320, (50,), generator=torch.Generator().manual_seed(2)).tolist()
    steps = PagedSteps(1, max_len=64, block_size=16)
    cache = KVCache(model.config, num_blocks=steps.num_blocks, block_size=16, dtype=torch.float32, device=CPU)
    chunks = [Chunk(0, 0, 30), *(Chunk(0, position, 1) for position in range(30, 50))]
    rows = [model.decoder.forward(steps.model_input([tokens], [chunk]), cache) for chunk in chunks]
    with torch.inference_mode():
        expected = oracle_of(folder, model)(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(torch.cat(rows), expected, rtol=2e-3, atol=2e-3)
