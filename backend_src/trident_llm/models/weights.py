"""A model's weights as a stream of tensors under Hugging Face's names: from a checkpoint, or random.

Every tensor is checked against the shapes the configuration calls for. Knows no layer classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch

from ..errors import LoadFailed
from .checkpoint import StoredTensor, open_checkpoint
from .model_config import ModelConfig
from .source import ModelSource

_DUMMY_STD = 0.02
_NAMES_SHOWN = 5


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order of the forward pass. Linear weights are [out, in].

    With tied embeddings there is no lm_head.weight.
    """
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        shapes.update((f"model.layers.{layer}.{name}", shape) for name, shape in _layer_shapes(config).items())
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linears = (
        ("self_attn.q_proj", q_size, hidden, config.attention_bias),
        ("self_attn.k_proj", kv_size, hidden, config.attention_bias),
        ("self_attn.v_proj", kv_size, hidden, config.attention_bias),
        ("self_attn.o_proj", hidden, q_size, config.attention_output_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    )
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, out_features, in_features, has_bias in linears:
        shapes[f"{name}.weight"] = (out_features, in_features)
        if has_bias:
            shapes[f"{name}.bias"] = (out_features,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    return shapes


def iter_weights(
    source: ModelSource,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Callable[[float], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of ``expected_shapes`` once, in the checkpoint's order, as ``dtype`` on ``device``.

    One tensor is held at a time. It may be a view of the mapped file: copy what is kept. ``progress`` gets the share
    of elements read, from 0 to 1. Names, shapes and file lengths are checked before the first tensor is yielded;
    raises ``LoadFailed`` naming the file and the tensor that is missing, unexpected, misshapen or truncated.
    """
    checkpoint = open_checkpoint(source, config)
    wanted = _check(checkpoint.tensors, source, config)
    total, done = sum(prod(tensor.shape) for tensor in checkpoint.tensors), 0
    for tensor, values in zip(checkpoint.tensors, checkpoint.read(), strict=True):
        if tensor.name in wanted:
            yield tensor.name, values.to(device).to(dtype)
        done += prod(tensor.shape)
        if progress is not None:
            progress(done / total)


def _check(tensors: list[StoredTensor], source: ModelSource, config: ModelConfig) -> set[str]:
    """Names to load. Raises ``LoadFailed`` unless the tensors are those that the configuration calls for."""
    expected = expected_shapes(config)
    found: set[str] = set()
    for tensor in tensors:
        if _is_ignored(tensor.name, config):
            continue
        if tensor.name not in expected:
            raise tensor.error(f"unexpected in a {config.architecture} of this configuration")
        if tensor.name in found:
            raise tensor.error("stored a second time")
        shape = expected[tensor.name]
        if tensor.shape != shape:
            raise tensor.error(f"has shape {list(tensor.shape)}; the configuration calls for {list(shape)}")
        found.add(tensor.name)
    missing = [name for name in expected if name not in found]
    if missing:
        shown = ", ".join(missing[:_NAMES_SHOWN]) + (", ..." if len(missing) > _NAMES_SHOWN else "")
        files = ", ".join(str(path) for path in source.weight_files)
        raise LoadFailed(f"{files}: {len(missing)} tensor(s) are missing: {shown}")
    return found


def _is_ignored(name: str, config: ModelConfig) -> bool:
    """Tensors some checkpoints hold that can be computed: rotary frequencies, and the copy of a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def iter_dummy_weights(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of ``expected_shapes`` in order, random and made on ``device``: normal with standard deviation
    0.02, norm weights 1 plus that. Each tensor depends on seed, name order, shape, dtype and device type alone."""
    for index, (name, shape) in enumerate(expected_shapes(config).items()):
        generator = torch.Generator(device).manual_seed((seed << 20) + index)
        values = torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(_DUMMY_STD)
        yield name, values.add_(1.0) if name.endswith("norm.weight") else values
