"""Random LoRA adapters and X-LoRA mixes of a model's shape, in PEFT's and the xlora package's files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from trident_llm.models.config_reader import read_model_config
from trident_llm.models.model_config import ModelConfig
from trident_llm.models.source import resolve_model


def write_random_adapters(folder: Path, model: str, *, count: int, rank: int) -> list[Path]:
    """``count`` adapters of all linear layers below ``folder``. Equal values, which the engine cannot know."""
    config = read_model_config(resolve_model(model, weights=False))
    first = folder / "adapter0"
    _write_adapter(first, config, rank)
    paths = [first]
    for index in range(1, count):
        path = folder / f"adapter{index}"
        path.mkdir()
        for file in first.iterdir():
            os.link(file, path / file.name)
        paths.append(path)
    return paths


def write_random_mix(folder: Path, model: str, *, members: int, rank: int, top_k: int) -> Path:
    """A mix with scalings for every module."""
    config = read_model_config(resolve_model(model, weights=False))
    paths = write_random_adapters(_made(folder / "adapters"), model, count=members, rank=rank)
    outputs = members * 7 * config.num_hidden_layers
    save_file(
        {"last.weight": torch.randn(outputs, config.hidden_size) * 0.02, "last.bias": torch.zeros(outputs)},
        folder / "xlora_classifier.safetensors",
    )
    values = {
        "hidden_size": config.hidden_size, "adapters": {path.name: "" for path in paths}, "layerwise_scalings": True,
        "top_k_lora": top_k,
    }  # fmt: skip
    (folder / "xlora_config.json").write_text(json.dumps(values))
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _write_adapter(folder: Path, config: ModelConfig, rank: int) -> None:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (q_size, hidden), "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden), "self_attn.o_proj": (hidden, q_size), "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for module, (num_outputs, num_inputs) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = 0.01 * torch.randn(rank, num_inputs, dtype=torch.bfloat16)
            tensors[f"{prefix}.lora_B.weight"] = 0.01 * torch.randn(num_outputs, rank, dtype=torch.bfloat16)
    save_file(tensors, _made(folder) / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
