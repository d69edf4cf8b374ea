"""read_model_config on config.json and generation_config.json, against transformers' own reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trident_llm.errors import BadRequest, LoadFailed
from trident_llm.models.config_reader import read_model_config
from trident_llm.models.model_config import ModelConfig
from trident_llm.models.registry import ARCHITECTURES
from trident_llm.models.source import resolve_model

FIELDS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def read(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """FIELDS with ``changes``, where ... takes a field away."""
    fields = {name: value for name, value in {**FIELDS, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_model_config(resolve_model(str(folder), weights=False))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 5e5, "head_dim": 32},
        {"sliding_window": 128, "attention_bias": True, "mlp_bias": True},
        {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 2},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
    ],
)
def test_equals_what_transformers_reads(tmp_path: Path, architecture: str, options: dict[str, Any]) -> None:
    ours = read(tmp_path, architectures=[architecture], **options)
    config_class = getattr(transformers, architecture).config_class
    theirs = config_class.from_json_file(str(tmp_path / "config.json"))
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    rope = dict(theirs.rope_parameters)
    assert ours.rope_theta == rope.pop("rope_theta")
    assert (ours.rope_scaling or {"rope_type": "default"}) == {key: rope[key] for key in rope if key != "type"}
    with torch.device("meta"):
        model = getattr(transformers, architecture)(theirs)
    attention = model.model.layers[0].self_attn
    assert ours.attention_bias == (attention.q_proj.bias is not None)
    assert ours.attention_output_bias == (attention.o_proj.bias is not None)
    assert ours.mlp_bias == (model.model.layers[0].mlp.up_proj.bias is not None)
    assert ours.qk_norm == hasattr(attention, "q_norm")
    if architecture != "LlamaForCausalLM":
        kinds = set(getattr(theirs, "layer_types", None) or ["sliding_attention"])
        assert ours.sliding_window == (theirs.sliding_window if kinds == {"sliding_attention"} else None)


def test_window_of_mistral(tmp_path: Path) -> None:
    mistral: dict[str, Any] = {"architectures": ["MistralForCausalLM"]}
    assert read(tmp_path, **mistral).sliding_window == 4096
    assert read(tmp_path, **mistral, sliding_window=None).sliding_window is None
    assert read(tmp_path, **mistral, sliding_window=99).sliding_window == 99


def test_llama3_scaling_keeps_its_parameters(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    assert read(tmp_path, rope_scaling=scaling, rope_theta=5e5).rope_scaling == scaling
    assert read(tmp_path, rope_parameters={**scaling, "rope_theta": 5e5}).rope_scaling == scaling


def test_generation_config_comes_first(tmp_path: Path) -> None:
    config = read(tmp_path, bos_token_id=1, eos_token_id=2)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    config = read(tmp_path, {"eos_token_id": [7, 9, 7]}, bos_token_id=1, eos_token_id=2)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (7, 9))
    assert read(tmp_path, {}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [({"torch_dtype": "bfloat16"}, "bf16"), ({"dtype": "float16"}, "fp16"), ({}, "fp32")],
)
def test_dtype(tmp_path: Path, fields: dict[str, Any], dtype: str) -> None:
    assert read(tmp_path, **fields).dtype == dtype


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="GPT2LMHeadModel") as caught:
        read(tmp_path, architectures=["GPT2LMHeadModel"])
    assert all(name in caught.value.message for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_size": ...}, "hidden_size: missing"),
        ({"architectures": ...}, "architectures: missing"),
        ({"vocab_size": "many"}, "vocab_size: 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0"),
        ({"num_attention_heads": True}, "num_attention_heads: True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3"),
        ({"hidden_size": 66}, "hidden_size: 66"),
        ({"head_dim": 15}, "head_dim: 15"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: -1"),
        ({"rope_theta": "x"}, "rope_theta: 'x'"),
        ({"rope_scaling": 8}, "rope_scaling: 8"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters: different parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype: 'float8_e4m3fn'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: 1"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8,
          "max_window_layers": 1}, "max_window_layers: 1"),
    ],
)  # fmt: skip
def test_bad_field_is_named_with_its_file(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(LoadFailed) as caught:
        read(tmp_path, **changes)
    assert caught.value.message.startswith(f"{tmp_path / 'config.json'}: ") and field in caught.value.message


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff\xfe"])
def test_config_that_is_no_json_object(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(LoadFailed, match=r"config\.json"):
        read_model_config(resolve_model(str(tmp_path), weights=False))
