"""Small random models in Hugging Face's layout, written by transformers so that it can serve as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trident_llm.models.tokenizer_files import write_byte_tokenizer


def write_tiny_llama(
    folder: Path,
    *,
    architecture: str = "LlamaForCausalLM",
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 320,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """Write config.json, generation_config.json, float32 safetensors and a byte tokenizer; returns ``folder``.

    ``config`` goes to the architecture's config class. Weights are larger than transformers initializes them, so
    that logits are far apart, and biases and norm weights differ from 0 and 1. bos is 1, eos 2.
    """
    import torch
    import transformers

    model_class = getattr(transformers, architecture)
    values = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    model = model_class(model_class.config_class(**values)).float()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        mean, std = (1.0, 0.1) if name.endswith("norm.weight") else (0.0, 0.1)
        parameter.data = mean + std * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_byte_tokenizer(Path(folder), vocab)
    return Path(folder)
