"""Every rope type against transformers: its frequencies, and whole models that use it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.fakes.tiny_decoders import CPU, MAX_LEN, SIZES, VOCAB, make_tiny
from trident_llm.errors import BadRequest
from trident_llm.models.model_config import ModelConfig
from trident_llm.models.rotary import RotaryEmbedding

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
SCALINGS = {
    "default": None,
    "default-named": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "old-key": {"type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "llama3-own-length": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-not-truncated": {**YARN, "truncate": False},
    "yarn-attention-factor": {**YARN, "attention_factor": 0.7},
    "yarn-mscale": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5},
}


def own_config(scaling, **changes) -> ModelConfig:
    values = {**SIZES, "architecture": "LlamaForCausalLM", "rope_theta": 10000.0, "rope_scaling": scaling, **changes}
    return ModelConfig(**values)


def new_embedding(config: ModelConfig, *, max_model_len: int = MAX_LEN) -> RotaryEmbedding:
    return RotaryEmbedding(config, max_model_len=max_model_len, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("name", SCALINGS)
def test_rows_equal_transformers(name, theta):
    scaling = SCALINGS[name]
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    parameters["rope_type"] = parameters.pop("type", parameters["rope_type"])
    oracle = LlamaRotaryEmbedding(LlamaConfig(**SIZES, rope_parameters=parameters))
    positions = torch.tensor([0, 1, 17, MAX_LEN - 1, 5])
    cos, sin = oracle(torch.empty(1, dtype=torch.float32), positions[None])
    rows = new_embedding(own_config(scaling, rope_theta=theta)).rows(positions)
    half = SIZES["head_dim"] // 2
    torch.testing.assert_close(rows.cos, cos[0].unsqueeze(1), rtol=0, atol=2e-6)
    torch.testing.assert_close(rows.sin[..., half:], sin[0].unsqueeze(1)[..., half:], rtol=0, atol=2e-6)
    assert torch.equal(rows.sin[..., :half], -rows.sin[..., half:])


@pytest.mark.parametrize("name", ["linear", "dynamic", "llama3", "yarn"])
def test_model_logits_equal_transformers(name):
    scaling = SCALINGS[name]
    tiny = make_tiny("Llama", {"rope_parameters": {**scaling, "rope_theta": 10000.0}}, {"rope_scaling": scaling})
    token_ids = torch.randint(VOCAB, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    (logits,) = tiny.run(PagedSteps(1, max_len=MAX_LEN, block_size=8), [token_ids], [[Chunk(0, 0, 90)]])
    torch.testing.assert_close(logits, tiny.expected(token_ids), rtol=0, atol=1e-4)


def test_an_unknown_rope_type_is_refused_by_name():
    with pytest.raises(BadRequest, match=r"'longrope'.*supported: default, dynamic, linear, llama3, yarn"):
        new_embedding(own_config({"rope_type": "longrope", "factor": 4.0}))


def test_a_partial_rotary_factor_is_refused():
    with pytest.raises(BadRequest, match=r"partial_rotary_factor 0\.5"):
        new_embedding(own_config({"rope_type": "default", "partial_rotary_factor": 0.5}))


def test_dynamic_beyond_the_trained_length_is_refused():
    with pytest.raises(BadRequest, match=rf"max_model_len: {MAX_LEN + 1}.*at most {MAX_LEN}"):
        new_embedding(own_config(SCALINGS["dynamic"]), max_model_len=MAX_LEN + 1)


def test_a_missing_parameter_is_named():
    with pytest.raises(BadRequest, match=r"'llama3' needs 'low_freq_factor'"):
        new_embedding(own_config({"rope_type": "llama3", "factor": 8.0}))
