"""The linear layers of a model as it runs them: q, k and v are one, and so are gate and up."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.model_config import ModelConfig

LAYER_MODULES = ("qkv", "o", "gate_up", "down")
"""Short names of a decoder layer's linear layers, in the order of the forward pass."""
HEAD = "lm_head"


@dataclass(frozen=True)
class Module:
    """One linear layer."""

    name: str
    """model.layers.0.self_attn.qkv_proj"""
    parts: tuple[str, ...]
    """Names of the checkpoint's projections that make it up, in the order they are stacked."""
    layer: int | None
    """None: the head."""
    num_inputs: int
    num_outputs: int


def model_modules(config: ModelConfig) -> list[Module]:
    """All of a model's linear layers, the head last."""
    modules = [module for index in range(config.num_hidden_layers) for module in modules_of_layer(config, index)]
    return [*modules, head_module(config)]


def head_module(config: ModelConfig) -> Module:
    """The head; with tied embeddings its weight is that of model.embed_tokens."""
    part = "model.embed_tokens" if config.tie_word_embeddings else HEAD
    return Module(HEAD, (part,), None, config.hidden_size, config.vocab_size)


def modules_of_layer(config: ModelConfig, index: int) -> list[Module]:
    """The linear layers of decoder layer ``index``, in the order of LAYER_MODULES."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."

    def module(prefix: str, name: str, parts: tuple[str, ...], num_inputs: int, num_outputs: int) -> Module:
        return Module(prefix + name, tuple(prefix + part for part in parts), index, num_inputs, num_outputs)

    return [
        module(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj"), hidden, q_size + 2 * kv_size),
        module(attention, "o_proj", ("o_proj",), q_size, hidden),
        module(mlp, "gate_up_proj", ("gate_proj", "up_proj"), hidden, 2 * inner),
        module(mlp, "down_proj", ("down_proj",), inner, hidden),
    ]
