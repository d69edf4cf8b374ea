"""Weights from safetensors and random ones. The oracle is transformers' state dict."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fakes.tiny_models import write_tiny_llama
from trident_llm.errors import LoadFailed
from trident_llm.models.config_reader import read_model_config
from trident_llm.models.model_config import ModelConfig
from trident_llm.models.registry import ARCHITECTURES
from trident_llm.models.source import resolve_model
from trident_llm.models.weights import DummyWeights, expected_shapes, iter_weights, open_weights


def load(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    source = resolve_model(str(folder))
    return dict(iter_weights(open_weights(source, read_model_config(source), dtype=dtype, device="cpu")))


def config_of(folder: Path) -> ModelConfig:
    return read_model_config(resolve_model(str(folder), weights=False))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_transformers_state_dict(tmp_path: Path, architecture: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    options = {"attention_bias": True, "mlp_bias": True} if tied else {"head_dim": 32}
    folder = write_tiny_llama(tmp_path, architecture=architecture, tie_word_embeddings=tied, **options)
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    weights = load(folder)
    assert set(weights) == set(state) - ({"lm_head.weight"} if tied else set())
    assert {name: tuple(values.shape) for name, values in weights.items()} == expected_shapes(config_of(folder))
    for name, values in weights.items():
        assert torch.equal(values, state[name]), name


def test_shards_cast_and_progress(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path, layers=3, max_shard_size="200KB")
    source = resolve_model(str(folder))
    assert len(source.weight_files) > 2
    whole = write_tiny_llama(tmp_path / "whole", layers=3)
    fractions: list[float] = []
    reader = open_weights(source, read_model_config(source), dtype=torch.bfloat16, device="cpu")
    weights, expected = dict(iter_weights(reader, fractions.append)), load(whole)
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and len(fractions) == len(weights)
    assert set(weights) == set(expected)
    for name, values in weights.items():
        assert torch.equal(values, expected[name].bfloat16()), name


def test_single_tensors_in_any_order_and_again(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path, layers=3, max_shard_size="200KB")
    source, expected = resolve_model(str(folder)), load(folder)
    reader = open_weights(source, read_model_config(source), dtype=torch.float32, device="cpu")
    assert reader.shapes == {name: tuple(values.shape) for name, values in expected.items()}
    names = [*reversed(reader.shapes), "model.layers.1.mlp.up_proj.weight"]
    for name in names:
        assert torch.equal(reader.read(name), expected[name]), name


def test_file_that_is_gone_is_named(folder: Path) -> None:
    source = resolve_model(str(folder))
    reader = open_weights(source, read_model_config(source), dtype=torch.float32, device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoadFailed, match=r"model\.safetensors: tensor model\.norm\.weight: cannot be read"):
        reader.read("model.norm.weight")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of model.safetensors; None takes one away."""
    path = folder / "model.safetensors"
    tensors = {name: values.clone() for name, values in load_file(path).items()} | changes
    save_file({name: values for name, values in tensors.items() if values is not None}, path)


def test_ignored_tensors(folder: Path) -> None:
    expected = load(folder)
    rewrite(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert set(load(folder)) == set(expected)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    assert set(load(folder)) == set(expected) - {"lm_head.weight"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.norm.weight": None, "lm_head.weight": None}, ["2 tensor(s) are missing: model.norm.weight, lm_head"]),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}, ["model.layers.2.mlp.up_proj.weight: unexpected"]),
        ({"model.norm.weight": torch.ones(63)}, ["model.norm.weight: has shape [63]", "calls for [64]"]),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int8)}, ["model.norm.weight: dtype I8"]),
    ],
)
def test_wrong_tensors_are_named(folder: Path, changes: dict[str, torch.Tensor | None], words: list[str]) -> None:
    rewrite(folder, **changes)
    with pytest.raises(LoadFailed) as caught:
        load(folder)
    message = caught.value.message
    assert str(folder / "model.safetensors") in message and all(word in message for word in words), message


def test_the_same_tensor_in_two_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "b.safetensors")
    index = {name: "a.safetensors" for name in tensors} | {"model.norm.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(LoadFailed, match=r"b\.safetensors: tensor model\.norm\.weight: stored a second time"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0{not json here}"])
def test_corrupt_file_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(LoadFailed, match=r"model\.safetensors: cannot be read as safetensors"):
        load(folder)


def test_truncated_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LoadFailed, match=r"model\.safetensors: cannot be read as safetensors"):
        load(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dummy_weights(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    config = config_of(write_tiny_llama(tmp_path, architecture=architecture))
    reader = DummyWeights(config, dtype=dtype, device="cpu", seed=3)
    first = dict(iter_weights(reader))
    again = {name: reader.read(name) for name in reversed(reader.shapes)}
    other = dict(iter_weights(DummyWeights(config, dtype=dtype, device="cpu", seed=4)))
    assert {name: tuple(values.shape) for name, values in first.items()} == expected_shapes(config)
    for name, values in first.items():
        assert values.dtype == dtype and torch.equal(values, again[name]) and not torch.equal(values, other[name])
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        assert abs(values.float().mean().item() - mean) < 0.03 and 0.005 < values.float().std().item() < 0.04, name
    layers = [first[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(2)]
    assert not torch.equal(*layers)


def test_shapes_with_every_option() -> None:
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=10, hidden_size=8, intermediate_size=6, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-5, rope_theta=1e4,
        max_position_embeddings=16, attention_bias=True, attention_output_bias=True, mlp_bias=True, qk_norm=True,
    )  # fmt: skip
    shapes = expected_shapes(config)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (16, 8)
    assert shapes["model.layers.0.self_attn.k_proj.bias"] == (8,)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (8, 16)
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (4,)
    assert shapes["model.layers.0.mlp.down_proj.bias"] == (8,)
    assert "lm_head.weight" not in expected_shapes(dataclasses.replace(config, tie_word_embeddings=True))
