"""A model's weights as a stream of tensors under Hugging Face's names: from a checkpoint, or random.

Every tensor is checked against the shapes the configuration calls for. Knows no layer classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Protocol

import torch

from ..errors import LoadFailed
from ..kernels.quantized_weight import QuantizedWeight
from .checkpoint import Checkpoint, SafetensorsCheckpoint, StoredTensor, open_checkpoint
from .model_config import ModelConfig
from .quantized_checkpoint import QuantizedCheckpoint, StoredWeight
from .source import ModelSource

_DUMMY_STD = 0.02
_NAMES_SHOWN = 5
_EMBEDDING = "model.embed_tokens.weight"
"""Its rows are looked up, so it is never kept quantized."""


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


class WeightReader(Protocol):
    """The parameters of ``expected_shapes``, each to be had at any time and as often as wanted."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every parameter once, in the order in which reading all of them is cheapest."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One parameter, in the reader's dtype and on its device, dequantized if it is stored quantized.

        It may be a view of a mapped file: copy what is kept, and write to no part of it. Raises ``LoadFailed`` naming
        file and tensor.
        """
        ...

    def read_stored(self, name: str) -> torch.Tensor | QuantizedWeight:
        """``read``, but a weight of a linear layer that is stored quantized stays as it is."""
        ...


def open_weights(
    source: ModelSource, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str
) -> WeightReader:
    """A reader of a model's files; headers alone are read here.

    Raises ``LoadFailed`` naming the file and the tensor that is missing, unexpected, misshapen or truncated.
    """
    return _CheckpointWeights(source, config, dtype=dtype, device=device)


def stored_weights(source: ModelSource, config: ModelConfig) -> Mapping[str, StoredWeight]:
    """The weights that a model's files hold quantized, from headers alone; checked as ``open_weights`` checks them."""
    checkpoint = _open(source, config, "cpu")
    _check(checkpoint.tensors, source, config)
    return checkpoint.stored_weights() if isinstance(checkpoint, QuantizedCheckpoint) else {}


class _CheckpointWeights:
    """The parameters of a checkpoint."""

    def __init__(
        self, source: ModelSource, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._checkpoint = _open(source, config, device)
        self._tensors = _check(self._checkpoint.tensors, source, config)
        self._dtype = dtype
        self._device = device
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        values = self._checkpoint.read(self._tensors[name])
        if isinstance(values, QuantizedWeight):
            return values.dequantize(self._dtype)
        return values.to(self._device).to(self._dtype)

    def read_stored(self, name: str) -> torch.Tensor | QuantizedWeight:
        values = self._checkpoint.read(self._tensors[name])
        if isinstance(values, QuantizedWeight) and name != _EMBEDDING:
            return values
        return self.read(name)


def _open(
    source: ModelSource, config: ModelConfig, device: torch.device | str
) -> Checkpoint | QuantizedCheckpoint:
    if config.quantization is None:
        return open_checkpoint(source, config)
    stored = SafetensorsCheckpoint(source.weight_files, quantized=True)
    return QuantizedCheckpoint(stored, config.quantization, expected_shapes(config), device)


class DummyWeights:
    """Random parameters, made on ``device`` when they are read: normal with standard deviation 0.02, norm weights 1
    plus that. Each depends on seed, its place in ``expected_shapes``, shape, dtype and device type alone. None is
    quantized, whatever the configuration says of the files."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> None:
        self.shapes = expected_shapes(config)
        self._seeds = {name: (seed << 20) + index for index, name in enumerate(self.shapes)}
        self._dtype = dtype
        self._device = device

    def read(self, name: str) -> torch.Tensor:
        generator = torch.Generator(self._device).manual_seed(self._seeds[name])
        values = torch.randn(self.shapes[name], generator=generator, dtype=self._dtype, device=self._device)
        values.mul_(_DUMMY_STD)
        return values.add_(1.0) if name.endswith("norm.weight") else values

    def read_stored(self, name: str) -> torch.Tensor:
        return self.read(name)


def iter_weights(
    reader: WeightReader, progress: Callable[[float], None] | None = None
) -> Iterator[tuple[str, torch.Tensor | QuantizedWeight]]:
    """Every parameter once, as it is stored, in the reader's order; one is held at a time.

    ``progress`` gets the share of elements read, from 0 to 1.
    """
    total, done = sum(map(prod, reader.shapes.values())), 0
    for name, shape in reader.shapes.items():
        yield name, reader.read_stored(name)
        done += prod(shape)
        if progress is not None:
            progress(done / total)


def _check(tensors: list[StoredTensor], source: ModelSource, config: ModelConfig) -> dict[str, StoredTensor]:
    """Tensors to load, by name. Raises ``LoadFailed`` unless they are those that the configuration calls for."""
    expected = expected_shapes(config)
    found: dict[str, StoredTensor] = {}
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
        found[tensor.name] = tensor
    missing = [name for name in expected if name not in found]
    if missing:
        shown = ", ".join(missing[:_NAMES_SHOWN]) + (", ..." if len(missing) > _NAMES_SHOWN else "")
        files = ", ".join(str(path) for path in source.weight_files)
        raise LoadFailed(f"{files}: {len(missing)} tensor(s) are missing: {shown}")
    return found


def _is_ignored(name: str, config: ModelConfig) -> bool:
    """Tensors some checkpoints hold that can be computed: rotary frequencies, and the copy of a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")
