"""One decoder layer in full precision, read when it is needed, and its forward pass over whole sequences.

The walk's own forward: dense batches of equal length and torch's attention, with every product of a linear layer left
to the caller. Knows neither the paged cache nor the kernels of serving.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LoadFailed
from ..models.model_config import ModelConfig
from ..models.rotary import RotaryEmbedding
from ..models.weights import WeightReader
from .modules import LAYER_MODULES, Module, modules_of_layer

Product = Callable[[str, Tensor], Tensor]
"""From a key of LAYER_MODULES and that layer's input [..., in] to its output, bias included."""


@dataclass
class FloatLayer:
    """Parameters of a layer, by the keys of LAYER_MODULES where they belong to a linear layer."""

    prefix: str
    """model.layers.0."""
    input_norm: Tensor
    post_attention_norm: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    """[out, in], the parts of merged layers above one another."""
    biases: dict[str, Tensor] = field(default_factory=dict)

    def parameters(self) -> dict[str, Tensor]:
        """All but the norms of q and k: norms by their full names, the others as KEY.weight and KEY.bias."""
        return {
            f"{self.prefix}input_layernorm.weight": self.input_norm,
            f"{self.prefix}post_attention_layernorm.weight": self.post_attention_norm,
            **{f"{key}.weight": weight for key, weight in self.weights.items()},
            **{f"{key}.bias": bias for key, bias in self.biases.items()},
        }

    def product(self, key: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[key].to(x.dtype), self.biases.get(key))


def read_layer(reader: WeightReader, config: ModelConfig, index: int) -> FloatLayer:
    """Every parameter is a copy of its own. Raises ``LoadFailed`` for weights that are not finite."""
    prefix = f"model.layers.{index}."

    def read(name: str) -> Tensor | None:
        full_name = prefix + name + ".weight"
        return reader.read(full_name).clone() if full_name in reader.shapes else None

    input_norm, post_attention_norm = read("input_layernorm"), read("post_attention_layernorm")
    assert input_norm is not None and post_attention_norm is not None
    layer = FloatLayer(prefix, input_norm, post_attention_norm, read("self_attn.q_norm"), read("self_attn.k_norm"))
    for key, module in zip(LAYER_MODULES, modules_of_layer(config, index), strict=True):
        layer.weights[key] = read_merged(reader, module, "weight")
        if f"{module.parts[0]}.bias" in reader.shapes:
            layer.biases[key] = read_merged(reader, module, "bias")
    return layer


def read_merged(reader: WeightReader, module: Module, kind: str) -> Tensor:
    """The ``kind`` (weight or bias) of a module's parts, one above another, as a copy."""
    merged = torch.cat([reader.read(f"{part}.{kind}") for part in module.parts])
    if not bool(merged.isfinite().all()):
        raise LoadFailed(f"model: the {kind} of {module.name} has values that are not finite; it cannot be quantized")
    return merged


class LayerForward:
    """Runs one layer over sequences of ``length`` tokens each."""

    def __init__(
        self, config: ModelConfig, *, length: int, max_model_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config = config
        rotary = RotaryEmbedding(config, max_model_len=max(max_model_len, length), dtype=dtype, device=device)
        rows = rotary.rows(torch.arange(length, device=device))
        self._cos, self._sin = rows.cos, rows.sin
        self._mask = None
        if config.sliding_window is not None and config.sliding_window < length:
            positions = torch.arange(length, device=device)
            distance = positions[:, None] - positions
            self._mask = (distance >= 0) & (distance < config.sliding_window)

    def __call__(self, layer: FloatLayer, hidden: Tensor, product: Product) -> Tensor:
        """hidden: [N, length, H] -> the layer's output of the same shape."""
        eps = self._config.rms_norm_eps
        x = torch.rms_norm(hidden, layer.input_norm.shape, layer.input_norm, eps)
        hidden = hidden + product("o", self._attention(layer, product("qkv", x)))
        x = torch.rms_norm(hidden, layer.post_attention_norm.shape, layer.post_attention_norm, eps)
        gate, up = product("gate_up", x).chunk(2, -1)
        return hidden + product("down", F.silu(gate) * up)

    def _attention(self, layer: FloatLayer, qkv: Tensor) -> Tensor:
        """qkv [N, length, (Hq + 2 * Hkv) * D] -> attention's output before its projection, [N, length, Hq * D]."""
        config = self._config
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        heads = qkv.view(*qkv.shape[:2], num_heads + 2 * num_kv_heads, config.head_dim)
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 2)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = torch.rms_norm(q, layer.q_norm.shape, layer.q_norm, config.rms_norm_eps)
            k = torch.rms_norm(k, layer.k_norm.shape, layer.k_norm, config.rms_norm_eps)
        q, k = self._rotate(q), self._rotate(k)
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=self._mask,
            is_causal=self._mask is None,
            enable_gqa=num_heads != num_kv_heads,
        )
        return attended.transpose(1, 2).flatten(2)

    def _rotate(self, heads: Tensor) -> Tensor:
        """heads [N, length, heads, D]; cos and sin as ``RotaryRows`` has them."""
        return heads * self._cos + heads.roll(self._config.head_dim // 2, -1) * self._sin
