"""Reads a ModelConfig from config.json and generation_config.json. GGUF metadata is gguf_config's matter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LoadFailed
from .gguf_config import read_gguf_config
from .model_config import ModelConfig
from .registry import Architecture, find_architecture
from .source import ModelSource
from .stored_quantization import StoredQuantization, read_stored_quantization

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_DEFAULT_ROPE_THETA = 10000.0
_DEFAULT_RMS_NORM_EPS = 1e-6
_DEFAULT_MAX_WINDOW_LAYERS = 28
"""transformers' defaults for fields that config.json may lack."""


def read_model_config(source: ModelSource) -> ModelConfig:
    """The configuration of a model. Raises ``BadRequest`` for an unknown architecture, listing the known ones, and
    ``LoadFailed`` naming file and field for one that is missing or cannot be."""
    if source.format == "gguf":
        return read_gguf_config(source.weight_files[0])
    fields = Fields(source.folder / "config.json")
    names = fields.get("architectures", list, None)
    if not names:
        raise fields.error("architectures", "missing; it names the model's class, such as LlamaForCausalLM")
    architecture = find_architecture(str(names[0]))
    _refuse_what_changes_the_model(fields)
    num_heads = fields.count("num_attention_heads")
    hidden_size = fields.count("hidden_size")
    attention_bias = architecture.reads_attention_bias and fields.get("attention_bias", bool, False)
    rope_theta, rope_scaling = _rope(fields)
    generation = source.folder / "generation_config.json"
    sources = (Fields(generation), fields) if generation.is_file() else (fields,)
    return ModelConfig(
        architecture=architecture.name,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_hidden_layers=fields.count("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=_num_key_value_heads(fields, num_heads),
        head_dim=_head_dim(fields, architecture, hidden_size, num_heads),
        rms_norm_eps=fields.positive("rms_norm_eps", _DEFAULT_RMS_NORM_EPS),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=fields.count("max_position_embeddings"),
        tie_word_embeddings=fields.get("tie_word_embeddings", bool, False),
        attention_bias=architecture.qkv_bias or attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=architecture.reads_mlp_bias and fields.get("mlp_bias", bool, False),
        qk_norm=architecture.qk_norm,
        sliding_window=_sliding_window(fields, architecture),
        dtype=_dtype(fields),
        bos_token_id=next(iter(_token_ids("bos_token_id", sources)), None),
        eos_token_ids=_token_ids("eos_token_id", sources),
        quantization=_quantization(fields),
    )


class Fields:
    """A JSON object in a file, whose fields are read with their types checked. null counts as missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LoadFailed(f"{path}: cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise LoadFailed(f"{path}: holds no JSON object")
        self.values: dict[str, Any] = values

    def error(self, name: str, problem: str) -> LoadFailed:
        return LoadFailed(f"{self.path}: {name}: {problem}")

    def get(self, name: str, kind: type, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise self.error(name, f"{value!r} is not of type {kind.__name__}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """An integer of at least 1."""
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, f"{value!r} is not a positive integer")
        return value

    def positive(self, name: str, default: float) -> float:
        """A number above 0."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.error(name, f"{value!r} is not a positive number")
        return float(value)


def _refuse_what_changes_the_model(fields: Fields) -> None:
    activation = fields.get("hidden_act", str, "silu")
    if activation != "silu":
        raise fields.error("hidden_act", f"{activation!r} is not supported; only silu is")


def _quantization(fields: Fields) -> StoredQuantization | None:
    values = fields.get("quantization_config", dict, None)
    return read_stored_quantization(values, fields.error) if values else None


def _num_key_value_heads(fields: Fields, num_heads: int) -> int:
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads ({num_heads})")
    return num_kv_heads


def _head_dim(fields: Fields, architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    if fields.values.get("head_dim") is None and not architecture.default_head_dim and hidden_size % num_heads:
        raise fields.error("hidden_size", f"{hidden_size} is not a multiple of num_attention_heads ({num_heads})")
    head_dim = fields.count("head_dim", architecture.default_head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"{head_dim} is odd; rotary embedding pairs its elements")
    return head_dim


def _rope(fields: Fields) -> tuple[float, Mapping[str, Any] | None]:
    """Base and scaling of the rotary embedding: rope_parameters (transformers 5), or rope_theta and rope_scaling."""
    name = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    rope = dict(fields.get(name, dict, {}))
    if not all(isinstance(key, str) and not isinstance(value, dict) for key, value in rope.items()):
        raise fields.error(name, "different parameters per layer type are not supported")
    if rope.get("partial_rotary_factor", fields.values.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise fields.error("partial_rotary_factor", "only 1.0 is supported")
    rope.pop("partial_rotary_factor", None)
    theta = rope.pop("rope_theta", None)
    if theta is None:
        theta = fields.positive("rope_theta", _DEFAULT_ROPE_THETA)
    if not isinstance(theta, (int, float)) or isinstance(theta, bool) or theta <= 0:
        raise fields.error(f"{name}.rope_theta", f"{theta!r} is not a positive number")
    old_name = rope.pop("type", "default")
    rope_type = rope.setdefault("rope_type", old_name)
    if rope_type == "default":
        return float(theta), None
    if rope_type in ("llama3", "yarn", "longrope"):
        rope.setdefault("original_max_position_embeddings", fields.count("max_position_embeddings"))
    return float(theta), rope


def _sliding_window(fields: Fields, architecture: Architecture) -> int | None:
    if architecture.window_is_optional:
        if not fields.get("use_sliding_window", bool, False) or fields.values.get("sliding_window") is None:
            return None
        return _window_of_late_layers(fields)
    if architecture.default_sliding_window is None:
        return None
    if "sliding_window" in fields.values and fields.values["sliding_window"] is None:
        return None
    return fields.count("sliding_window", architecture.default_sliding_window)


def _window_of_late_layers(fields: Fields) -> int | None:
    """The window, where layer_types or max_window_layers say which layers have it: all layers or none."""
    num_layers = fields.count("num_hidden_layers")
    first = fields.get("max_window_layers", int, _DEFAULT_MAX_WINDOW_LAYERS)
    computed = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    kinds = set(fields.get("layer_types", list, computed))
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise fields.error(
            "max_window_layers", f"{first}: a sliding window in some of the {num_layers} layers only is not supported"
        )
    return fields.count("sliding_window")


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    dtype = fields.get(name, str, "float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise fields.error(name, f"{dtype!r} is not supported; supported: {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _token_ids(name: str, sources: tuple[Fields, ...]) -> tuple[int, ...]:
    """One id or several, from the first file that has the field."""
    for fields in sources:
        value = fields.values.get(name)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise fields.error(name, f"{value!r} is neither a token id nor a list of token ids")
        return tuple(dict.fromkeys(ids))
    return ()
