"""Scales of a linear layer's inputs, moved into the operation before it: the layer computes what it did.

W x = (W diag(s)) (diag(1/s) x), and x comes from something linear in its last step: a norm's weight for qkv and
gate_up, the rows of v for o, the rows of up for down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.model_config import ModelConfig
from .float_layer import FloatLayer

_NORMS = {"qkv": "input_norm", "gate_up": "post_attention_norm"}
_SOURCES = {"o": "qkv", "down": "gate_up"}
"""Layers whose last outputs are, linearly, another layer's inputs: v and up."""


@dataclass(frozen=True)
class Folded:
    """The scales in effect, float32."""

    inputs: Tensor
    """[in]: the weight was multiplied by them, and what it reads is divided by them."""
    source: str | None = None
    """The layer whose outputs are divided; None: a norm."""
    outputs: Tensor | None = None
    """[out of source]: what its outputs are divided by."""


def share_scales(config: ModelConfig, key: str, scales: Tensor) -> Tensor:
    """The nearest scales [in] that can be folded: query heads that read one head of v share theirs (geometric mean)."""
    if key != "o":
        return scales
    groups = scales.view(config.num_key_value_heads, -1, config.head_dim)
    return groups.log().mean(1, keepdim=True).exp().expand_as(groups).reshape(-1)


def fold_scales(layer: FloatLayer, config: ModelConfig, key: str, scales: Tensor) -> Folded:
    """Multiply the weight of ``key`` by scales [in] (float32, as ``share_scales`` returns them) and divide what makes
    its input.

    A norm's weight is stored in the model's dtype: the scales in effect are those that its rounding leaves.
    """
    if key in _NORMS:
        folded = _fold_into_norm(layer, _NORMS[key], scales)
    else:
        if key == "o":
            # Query heads of a KV head have equal scales: the first one's are the head's.
            divisors = scales.view(config.num_key_value_heads, -1, config.head_dim)[:, 0].reshape(-1)
        else:
            divisors = scales
        folded = Folded(scales, _SOURCES[key], _divide_last_outputs(layer, _SOURCES[key], divisors))
    layer.weights[key] = layer.weights[key].float() * folded.inputs
    return folded


def _fold_into_norm(layer: FloatLayer, attribute: str, scales: Tensor) -> Folded:
    norm = getattr(layer, attribute)
    divided = (norm.float() / scales).to(norm.dtype)
    usable = (norm != 0) & (divided != 0)
    divided = torch.where(usable, divided, norm)
    setattr(layer, attribute, divided)
    return Folded(torch.where(usable, norm.float() / divided.float(), torch.ones_like(scales)))


def _divide_last_outputs(layer: FloatLayer, key: str, divisors: Tensor) -> Tensor:
    """Divide the last outputs of a layer; returns the divisors of all of them."""
    weight, bias = layer.weights[key].float(), layer.biases.get(key)
    every = torch.cat((divisors.new_ones(weight.shape[0] - divisors.shape[0]), divisors))
    layer.weights[key] = weight / every[:, None]
    if bias is not None:
        layer.biases[key] = (bias.float() / every).to(bias.dtype)
    return every
