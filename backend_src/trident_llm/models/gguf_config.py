"""Reads a ModelConfig from the metadata of a GGUF file, and names its tensors as Hugging Face does.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from ..errors import BadRequest, LoadFailed
from .gguf_file import GgufFile, open_gguf
from .model_config import ModelConfig
from .registry import Architecture, find_gguf_architecture

ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192
"""low_freq_factor, high_freq_factor and original_max_position_embeddings of all Llama 3.1 to 3.3 models."""
_DTYPES = {GGMLQuantizationType.F16: "fp16", GGMLQuantizationType.BF16: "bf16"}


def read_gguf_config(path: Path) -> ModelConfig:
    """The configuration in a GGUF file. Raises ``BadRequest`` for an unknown architecture and ``LoadFailed`` naming
    the file and the key that is missing or wrong."""
    file = open_gguf(path)
    architecture = gguf_architecture(file)
    keys = _Keys(file, str(file.metadata["general.architecture"]))
    if keys.count("expert_count", 0):
        raise BadRequest(f"model: {path.name} is a mixture of experts, which is not supported")
    if file.metadata.get("split.count", 1) > 1:
        raise BadRequest(f"model: {path.name} is one part of a split GGUF model; merge the parts first")
    num_heads = keys.count("attention.head_count")
    hidden_size = keys.count("embedding_length")
    theta = keys.number("rope.freq_base", 10000.0)
    head_dim = keys.count("attention.key_length", keys.count("rope.dimension_count", hidden_size // num_heads))
    if head_dim % 2:
        raise keys.error("attention.key_length", f"{head_dim} is odd; rotary embedding pairs its elements")
    num_kv_heads = keys.count("attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise keys.error("attention.head_count_kv", f"{num_kv_heads} does not divide head_count ({num_heads})")
    eos = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    embedding = file.tensors.get("token_embd.weight")
    return ModelConfig(
        architecture=architecture.name,
        vocab_size=keys.count("vocab_size", embedding.shape[0] if embedding else None),
        hidden_size=hidden_size,
        intermediate_size=keys.count("feed_forward_length"),
        num_hidden_layers=keys.count("block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon", None),
        rope_theta=theta,
        rope_scaling=_rope_scaling(keys, theta, head_dim),
        max_position_embeddings=keys.count("context_length"),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        qk_norm=architecture.qk_norm,
        sliding_window=keys.count("attention.sliding_window", 0) or None,
        dtype=_DTYPES.get(embedding.quantization, "fp32") if embedding else "fp32",
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(token for token in eos if token is not None)),
    )


def gguf_architecture(file: GgufFile) -> Architecture:
    """The architecture a GGUF file names."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise LoadFailed(f"{file.path}: general.architecture: missing")
    return find_gguf_architecture(name)


class _Keys:
    """Metadata below the architecture's prefix, with types checked."""

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self.file = file
        self._prefix = prefix

    def error(self, name: str, problem: str) -> LoadFailed:
        return LoadFailed(f"{self.file.path}: {self._prefix}.{name}: {problem}")

    def value(self, name: str) -> Any:
        return self.file.metadata.get(f"{self._prefix}.{name}")

    def count(self, name: str, default: int | None = None) -> int:
        value = self.value(name)
        if value is None:
            if default is None:
                raise self.error(name, "missing")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (value == 0 and default != 0):
            raise self.error(name, f"{value!r} is not a positive integer")
        return value

    def number(self, name: str, default: float | None) -> float:
        value = self.value(name)
        if value is None:
            if default is None:
                raise self.error(name, "missing")
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.error(name, f"{value!r} is not a positive number")
        return float(value)


def _rope_scaling(keys: _Keys, theta: float, head_dim: int) -> Mapping[str, Any] | None:
    if ROPE_FACTORS in keys.file.tensors:
        return _llama3_scaling(keys.file, theta, head_dim)
    rope_type = keys.value("rope.scaling.type")
    if rope_type in (None, "none"):
        return None
    if rope_type not in ("linear", "yarn"):
        raise keys.error("rope.scaling.type", f"{rope_type!r} is not supported; supported: none, linear, yarn")
    scaling: dict[str, Any] = {"rope_type": rope_type, "factor": keys.number("rope.scaling.factor", None)}
    if rope_type == "yarn":
        context = keys.count("context_length")
        scaling["original_max_position_embeddings"] = keys.count("rope.scaling.original_context_length", context)
    return scaling


def _llama3_scaling(file: GgufFile, theta: float, head_dim: int) -> Mapping[str, Any]:
    """The parameters behind the divisors of the rotary frequencies that GGUF stores for Llama 3.1 and later.

    GGUF keeps the result of the rule, not its parameters. The largest divisor is the factor; the rest is the same in
    all published models, and checked here by computing the divisors again (transformers, modeling_rope_utils).
    """
    divisors = file.read(ROPE_FACTORS)
    factor = float(divisors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    share = (_LLAMA3_CONTEXT / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    share = np.clip(share, 0.0, 1.0)
    expected = 1 / ((1 - share) / factor + share)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise LoadFailed(f"{file.path}: tensor {ROPE_FACTORS}: not the rotary scaling of Llama 3, which is supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
