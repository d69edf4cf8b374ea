"""ModelConfig: the shape of a decoder-only model, independent of the file format it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .stored_quantization import StoredQuantization


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a Llama-family decoder, with Hugging Face's names where it has them."""

    architecture: str
    """Hugging Face class name, e.g. LlamaForCausalLM."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: Mapping[str, Any] | None = None
    """Hugging Face's rope parameters (rope_type llama3, linear, yarn, ...); None for plain rotary embedding."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """q, k and v projections have a bias (Qwen2)."""
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm per head on q and k before the rotary embedding (Qwen3)."""
    sliding_window: int | None = None
    """Tokens a position attends to, itself included; None for all."""
    dtype: str = "bf16"
    """What the checkpoint stores: bf16 | fp16 | fp32."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())
    quantization: StoredQuantization | None = None
    """How the checkpoint stores its linear layers; None: in full precision."""
