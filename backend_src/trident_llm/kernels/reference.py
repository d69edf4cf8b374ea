"""Torch twins of the decoder's operators, for the CPU; signatures and meanings are those of ``Kernels``.

On x86 CPUs linear layers read weights that oneDNN has packed: about twice as fast as plain ones at one token.
Quantized weights are ``reference_quantized``'s.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference_quantized
from .layer_cache import SCALED_LIMITS, LayerCache
from .lora_layer import LoraLayer, LoraRows
from .quantized_weight import QuantizedWeight
from .reference_attention import AttentionPlan, paged_attention, plan_attention
from .reference_lora import add_lora
from .reference_quantized import PackedWeight

__all__ = [
    "fused_add_rms_norm",
    "input_codes",
    "linear",
    "linear_add_rms_norm",
    "linear_lora",
    "linear_lora_add_rms_norm",
    "linear_lora_silu_and_mul",
    "linear_silu_and_mul",
    "pack_linear",
    "paged_attention",
    "plan_attention",
    "rms_norm",
    "rotary_embed_and_store_kv",
    "silu_and_mul",
]


def _onednn_dtypes() -> frozenset[torch.dtype]:
    """Dtypes of weights that oneDNN packs on this machine."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    bf16 = {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    return frozenset({torch.float32} | bf16)


_PACKED_DTYPES = _onednn_dtypes()


def pack_linear(weight: Tensor | QuantizedWeight) -> Tensor | PackedWeight:
    if isinstance(weight, QuantizedWeight):
        return reference_quantized.pack(weight)
    if weight.device.type == "cpu" and weight.dtype in _PACKED_DTYPES:
        return torch.ops.mkldnn._reorder_linear_weight.default(weight)
    return weight


def input_codes(weight: Tensor | PackedWeight, num_rows: int, dtype: torch.dtype) -> torch.dtype | None:
    """None: products with 8-bit activations make their own codes, in a form that the operator below them wants."""
    del weight, num_rows, dtype
    return None


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, PackedWeight):
        y = reference_quantized.linear(x, weight)
        return y if bias is None else y.add_(bias)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear_lora(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, layer: LoraLayer, rows: LoraRows
) -> Tensor:
    y = linear(x, weight, bias)
    add_lora(y, x, bias, layer, rows)
    return y


def linear_lora_silu_and_mul(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, layer: LoraLayer, rows: LoraRows
) -> Tensor:
    return silu_and_mul(linear_lora(x, weight, bias, layer, rows))


def linear_lora_add_rms_norm(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    layer: LoraLayer,
    rows: LoraRows,
) -> Tensor:
    return fused_add_rms_norm(linear_lora(x, weight, bias, layer, rows), residual, norm_weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.rms_norm(x, weight.shape, weight, eps)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.rms_norm(residual.add_(x), weight.shape, weight, eps)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def linear_silu_and_mul(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, codes: torch.dtype | None = None
) -> Tensor:
    del codes
    return silu_and_mul(linear(x, weight, bias))


def linear_add_rms_norm(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    codes: torch.dtype | None = None,
) -> Tensor:
    del codes
    return fused_add_rms_norm(linear(x, weight, bias), residual, norm_weight, eps)


def rotary_embed_and_store_kv(qkv: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, plan: AttentionPlan) -> None:
    head_dim, kv_rows = qkv.shape[-1], 2 * cache.values.shape[3]
    first_kv = qkv.shape[1] - kv_rows
    heads = qkv[:, : first_kv + kv_rows // 2]
    swapped = heads.roll(head_dim // 2, -1)
    heads.mul_(cos).addcmul_(swapped, sin)
    kv = qkv[:, first_kv:]
    if plan.stored_rows is not None:
        kv = kv.index_select(0, plan.stored_rows)
    if cache.scales is not None:
        assert cache.values.dtype == torch.int8
        scales = kv.abs().amax(-1).float().clamp_min_(1e-12).div_(SCALED_LIMITS[torch.int8])
        # No quotient can round to more than the limit: the largest value of a head made its scale.
        kv = kv.float().div(scales.unsqueeze(-1)).round_().to(torch.int8)
        cache.scales.view(-1, kv_rows).index_copy_(0, plan.slots, scales)
    cache.values.view(-1, kv_rows, head_dim).index_copy_(0, plan.slots, kv)
