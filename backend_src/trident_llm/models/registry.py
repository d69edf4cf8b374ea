"""The decoder architectures Trident knows, and what sets each apart from plain Llama.

Adding a Llama-like model is adding an entry here; readers of config.json and GGUF metadata look it up by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BadRequest


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One Hugging Face ``*ForCausalLM`` class: RMSNorm, rotary embedding, grouped attention, SwiGLU, and these."""

    name: str
    gguf_name: str | None
    """``general.architecture`` of its GGUF files; None: they call themselves by another entry's name."""
    qkv_bias: bool = False
    """q, k and v projections always have a bias, o never; config.json has no say."""
    reads_attention_bias: bool = False
    """config.json's attention_bias puts a bias on q, k, v and o."""
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm per head on q and k."""
    default_head_dim: int | None = None
    """When config.json has none; None: hidden_size / num_attention_heads."""
    default_sliding_window: int | None = None
    """When config.json has no such key (null means no window)."""
    window_is_optional: bool = False
    """sliding_window counts only with use_sliding_window, and from layer max_window_layers on."""
    gguf_interleaves_qk: bool = False
    """Its GGUF files store the rows of q and k in the order of rotary pairs: 0, d/2, 1, d/2 + 1, ..."""


_KNOWN = (
    Architecture(
        name="LlamaForCausalLM",
        gguf_name="llama",
        reads_attention_bias=True,
        reads_mlp_bias=True,
        gguf_interleaves_qk=True,
    ),
    Architecture(name="MistralForCausalLM", gguf_name=None, default_sliding_window=4096),
    Architecture(name="Qwen2ForCausalLM", gguf_name="qwen2", qkv_bias=True, window_is_optional=True),
    Architecture(
        name="Qwen3ForCausalLM",
        gguf_name="qwen3",
        reads_attention_bias=True,
        qk_norm=True,
        default_head_dim=128,
        window_is_optional=True,
    ),
)
ARCHITECTURES = {architecture.name: architecture for architecture in _KNOWN}


def find_architecture(name: str) -> Architecture:
    """The entry for a Hugging Face class name. Raises ``BadRequest`` listing those known."""
    if name not in ARCHITECTURES:
        raise BadRequest(f"model: architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def find_gguf_architecture(name: str) -> Architecture:
    """The entry for a GGUF ``general.architecture``. Raises ``BadRequest`` listing those known."""
    for architecture in _KNOWN:
        if architecture.gguf_name == name:
            return architecture
    known = ", ".join(architecture.gguf_name for architecture in _KNOWN if architecture.gguf_name)
    raise BadRequest(f"model: GGUF architecture {name!r} is not supported; supported: {known}")
