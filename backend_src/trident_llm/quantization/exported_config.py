"""config.json of an exported model: the model's own fields, and quantization_config as compressed-tensors has it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.quantized_weight import Activations, QuantizedWeight
from ..models.model_config import ModelConfig
from ..models.source import ModelSource

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_FORMATS: Mapping[Activations, str] = {"none": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}


@dataclass(frozen=True)
class Scheme:
    """What a group of compressed-tensors says of the weights of its layers."""

    bits: int
    group_size: int | None
    """None: a scale per output."""
    symmetric: bool
    activations: Activations

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Scheme:
        whole_rows = weight.group_size == weight.shape[1]
        middle = weight.zero_points == 2 ** (weight.bits - 1)
        symmetric = weight.activations == "fp8" or bool(middle.all())
        return cls(weight.bits, None if whole_rows else weight.group_size, symmetric, weight.activations)

    @property
    def format(self) -> str:
        return _FORMATS[self.activations]

    def group(self, targets: Sequence[str]) -> dict[str, Any]:
        """The entry of config_groups for these targets."""
        kind = "float" if self.activations == "fp8" else "int"
        grouping = {"strategy": "group", "group_size": self.group_size} if self.group_size else {"strategy": "channel"}
        weights = {"num_bits": self.bits, "type": kind, "symmetric": self.symmetric, "dynamic": False, **grouping}
        tokens = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"}
        return {
            "targets": list(targets),
            "format": self.format,
            "weights": weights,
            "input_activations": None if self.activations == "none" else tokens,
            "output_activations": None,
        }


def quantization_config(schemes: Mapping[str, Scheme], full: Sequence[str]) -> dict[str, Any]:
    """schemes: of the quantized layers by name; full: names of the linear layers in full precision.

    The commonest scheme is that of all linear layers, the others name theirs.
    """
    counts = Counter(schemes.values())
    commonest = [scheme for scheme, _ in counts.most_common()]
    groups = {}
    for index, scheme in enumerate(commonest):
        names = [name for name, own in schemes.items() if own == scheme]
        groups[f"group_{index}"] = scheme.group(["Linear"] if index == 0 else names)
    formats = {scheme.format for scheme in commonest}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": list(full) if "lm_head" in schemes else [*full, *({"lm_head"} - set(full))],
        "kv_cache_scheme": None,
    }


def config_fields(source: ModelSource, config: ModelConfig, *, dtype: torch.dtype, tied: bool) -> dict[str, Any]:
    """The model's config.json, or for GGUF what transformers needs of it."""
    if source.format == "gguf":
        fields = _fields_of(config)
    else:
        fields = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    fields.pop("torch_dtype", None)
    return {**fields, "dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": tied}


def _fields_of(config: ModelConfig) -> dict[str, Any]:
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "sliding_window",
        "bos_token_id",
    )  # fmt: skip
    eos = list(config.eos_token_ids)
    rope = dict(config.rope_scaling or {"rope_type": "default"})
    return {
        "architectures": [config.architecture],
        "model_type": _MODEL_TYPES[config.architecture],
        "hidden_act": "silu",
        **{name: getattr(config, name) for name in same},
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }
