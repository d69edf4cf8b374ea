"""GGUF: configuration, tensors and broken files. The oracles are transformers and the gguf package's own reader."""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests.fakes.tiny_gguf import write_tiny_gguf
from tests.fakes.tiny_models import write_tiny_llama
from trident_llm.errors import BadRequest, LoadFailed
from trident_llm.models.config_reader import read_model_config
from trident_llm.models.gguf_file import open_gguf
from trident_llm.models.model_config import ModelConfig
from trident_llm.models.source import resolve_model
from trident_llm.models.weights import iter_weights, open_weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


def load(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    source = resolve_model(str(path))
    config = read_model_config(source)
    return config, dict(iter_weights(open_weights(source, config, dtype=torch.float32, device="cpu")))


def test_header_equals_that_of_the_gguf_package(smollm2_gguf: Path) -> None:
    ours, theirs = open_gguf(smollm2_gguf), gguf.GGUFReader(smollm2_gguf)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert (mine.quantization, mine.offset) == (tensor.tensor_type, tensor.data_offset)
    assert len(ours.tensors) == len(theirs.tensors)
    for key, value in ours.metadata.items():
        contents = theirs.fields[key].contents()
        assert value == (len(contents) if isinstance(value, int) and isinstance(contents, list) else contents), key


def test_smollm2_equals_what_transformers_loads(smollm2_gguf: Path, smollm2_oracle: Any) -> None:
    state, theirs = smollm2_oracle.state_dict(), smollm2_oracle.config
    config, ours = load(smollm2_gguf)
    assert set(ours) == set(state) - {"lm_head.weight"}
    chosen = [name for name in ours if "layers." not in name or name.split(".")[2] in ("0", "7", "29")]
    for name in chosen:
        assert torch.equal(ours[name], state[name]), name
    assert len(chosen) == 2 + 3 * 9
    assert (config.architecture, config.head_dim, config.tie_word_embeddings) == ("LlamaForCausalLM", 64, True)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "bos_token_id"):  # fmt: skip
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.eos_token_ids == (theirs.eos_token_id,)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_round_trip_through_gguf(tmp_path: Path, architecture: str, tied: bool) -> None:
    biases: dict[str, Any] = (
        {"attention_bias": True, "mlp_bias": True} if architecture == "LlamaForCausalLM" and tied else {}
    )
    write_tiny_llama(tmp_path, architecture=architecture, tie_word_embeddings=tied, **biases)
    config, weights = load(tmp_path)
    gguf_config, gguf_weights = load(write_tiny_gguf(tmp_path, tmp_path / "model.gguf"))
    assert dataclasses.replace(gguf_config, rms_norm_eps=config.rms_norm_eps) == config
    assert math.isclose(gguf_config.rms_norm_eps, config.rms_norm_eps, rel_tol=1e-6)
    assert set(gguf_weights) == set(weights)
    for name, values in weights.items():
        assert torch.equal(gguf_weights[name], values), name


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_block_formats(tmp_path: Path, tiny: Path, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    config, weights = load(write_tiny_gguf(tiny, tmp_path / "model.gguf", quantization=kind))
    assert config.dtype == {"F16": "fp16", "BF16": "bf16"}.get(name, "fp32")
    for key, values in load(tiny)[1].items():
        expected = gguf.dequantize(gguf.quantize(values.numpy(), kind), kind) if values.ndim == 2 else values.numpy()
        assert np.array_equal(weights[key].numpy(), expected), key


@pytest.mark.parametrize(
    ("extra", "scaling"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, tiny: Path, extra: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    path = write_tiny_gguf(tiny, tmp_path / "model.gguf", extra=extra)
    assert read_model_config(resolve_model(str(path))).rope_scaling == scaling


def test_llama3_scaling_is_found_from_its_divisors(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    folder = write_tiny_llama(tmp_path, hidden=256, rope_theta=500000.0)
    plain = 1.0 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    oracle = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters={**scaling, "rope_theta": 500000.0})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](oracle, "cpu")
    path = write_tiny_gguf(folder, tmp_path / "model.gguf", rope_divisors=plain / scaled.numpy())
    config, weights = load(path)
    assert config.rope_scaling is not None
    assert {**config.rope_scaling, "factor": round(config.rope_scaling["factor"], 3)} == scaling
    assert "rope_freqs.weight" not in weights
    path = write_tiny_gguf(folder, tmp_path / "other.gguf", rope_divisors=np.linspace(1, 8, 32))
    with pytest.raises(LoadFailed, match=r"rope_freqs\.weight: not the rotary scaling of Llama 3"):
        read_model_config(resolve_model(str(path)))


@pytest.mark.parametrize(
    ("drop", "extra", "words"),
    [
        ("attention.head_count", {}, "llama.attention.head_count: missing"),
        ("attention.layer_norm_rms_epsilon", {}, "llama.attention.layer_norm_rms_epsilon: missing"),
        ("", {"attention.head_count_kv": 3}, "llama.attention.head_count_kv: 3 does not divide"),
        ("", {"block_count": 0}, "llama.block_count: 0"),
        ("", {"embedding_length": "wide"}, "llama.embedding_length: 'wide'"),
        ("", {"rope.scaling.type": "magic"}, "llama.rope.scaling.type: 'magic'"),
    ],
)
def test_bad_metadata_is_named(tmp_path: Path, tiny: Path, drop: str, extra: dict[str, Any], words: str) -> None:
    path = write_tiny_gguf(tiny, tmp_path / "model.gguf", drop=(drop,), extra=extra)
    with pytest.raises(LoadFailed) as caught:
        read_model_config(resolve_model(str(path)))
    assert str(path) in caught.value.message and words in caught.value.message


@pytest.mark.parametrize(("extra", "words"), [({"expert_count": 8}, "mixture of experts")])
def test_models_that_are_something_else(tmp_path: Path, tiny: Path, extra: dict[str, Any], words: str) -> None:
    path = write_tiny_gguf(tiny, tmp_path / "model.gguf", extra=extra)
    with pytest.raises(BadRequest, match=words):
        read_model_config(resolve_model(str(path)))


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(BadRequest, match="'mamba' is not supported; supported: llama, qwen2, qwen3"):
        read_model_config(resolve_model(str(tmp_path)))


def test_truncated_weights_name_the_tensor(tmp_path: Path, tiny: Path) -> None:
    whole = write_tiny_gguf(tiny, tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadFailed, match=r"cut\.gguf.*tensor .* ends at byte .*truncated"):
        open_gguf(path)


def test_every_broken_header_is_refused(tmp_path: Path, tiny: Path) -> None:
    """Cut at many places, or with each byte of the first pages turned over: refused or read, never another error."""
    whole = write_tiny_gguf(tiny, tmp_path / "whole.gguf")
    data, header_bytes = whole.read_bytes(), open_gguf(whole).header_bytes
    path = tmp_path / "broken.gguf"
    for end in range(0, header_bytes, 7):
        path.write_bytes(data[:end])
        with pytest.raises(LoadFailed, match=r"broken\.gguf"):
            open_gguf(path)
    for at in range(0, header_bytes, 5):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            open_gguf(path)
        except LoadFailed as error:
            assert "broken.gguf" in error.message


def test_huge_counts_end_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60))
    with pytest.raises(LoadFailed, match="truncated"):
        open_gguf(path)
    key = struct.pack("<Q", 1) + b"k"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, 6, 2**62))
    with pytest.raises(LoadFailed, match="truncated"):
        open_gguf(path)
