"""The decoder's operators in the Triton language, for NVIDIA GPUs; signatures and meanings are those of ``Kernels``.

Every launch depends on shapes alone, never on values, so a step can be captured into a CUDA graph: lengths, block
tables and slots are read on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine.batch import AttentionMetadata
from .dense_linear import DenseLinear
from .layer_cache import LayerCache
from .lora import add_lora, expand, shrink
from .lora_layer import LoraLayer, LoraRows
from .packed_bytes import PackedBytes, pack_quantized
from .packed_linear import PackedLinear
from .packed_weight import PackedWeight
from .quantized_linear import QuantizedLinear
from .quantized_rows import Rows
from .quantized_weight import QuantizedWeight
from .rms_norm import rms_norm
from .rotary_store import rotary_embed_and_store_kv
from .scaled_linear import ScaledLinear
from .silu_and_mul import silu_and_mul
from .step_attention import AttentionPlan, StepAttention, plan_attention

Weight = Tensor | PackedWeight | PackedBytes


class TritonLanguageKernels:
    """Implements ``Kernels`` on one CUDA device. Holds no tensors: workspaces come from torch's allocator.

    num_processors: multiprocessors of the device. pdl: whether it knows programmatic dependent launch. side_stream: for
    what can run beside other kernels; None: nothing does. hopper: whether it has Hopper's matrix instructions.
    """

    def __init__(
        self,
        *,
        num_processors: int,
        pdl: bool,
        side_stream: torch.cuda.Stream | None = None,
        hopper: bool = False,
    ) -> None:
        self._attention = StepAttention(num_processors=num_processors, pdl=pdl, hopper=hopper)
        self._pdl = pdl
        self._side_stream = side_stream
        self._dense = DenseLinear(pdl=pdl, hopper_processors=num_processors if hopper else 0)
        self._packed: dict[type, PackedLinear[Any]] = {
            PackedWeight: QuantizedLinear(pdl=pdl, hopper_processors=num_processors if hopper else 0),
            PackedBytes: ScaledLinear(pdl=pdl, hopper_processors=num_processors if hopper else 0),
        }
        """Who multiplies with what is not a plain tensor."""

    @classmethod
    def for_device(cls, device: torch.device) -> TritonLanguageKernels:
        properties = torch.cuda.get_device_properties(device)
        # Programmatic dependent launch came with compute capability 9.0.
        return cls(
            num_processors=properties.multi_processor_count,
            pdl=properties.major >= 9,
            side_stream=torch.cuda.Stream(device),
            hopper=properties.major == 9,
        )

    def pack_linear(self, weight: Tensor | QuantizedWeight) -> Weight:
        if isinstance(weight, Tensor):
            return weight.contiguous()
        return pack_quantized(weight)

    def input_codes(self, weight: Weight, num_rows: int, dtype: torch.dtype) -> torch.dtype | None:
        return None if isinstance(weight, Tensor) else self._packed[type(weight)].input_codes(weight, num_rows, dtype)

    def linear(self, x: Rows, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, Tensor):
            return self._packed[type(weight)].linear(x, weight, bias)
        assert isinstance(x, Tensor)
        return self._dense.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rms_norm(x, weight, eps, out, pdl=self._pdl)
        return out

    def fused_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rms_norm(x, weight, eps, out, residual=residual, pdl=self._pdl)
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        silu_and_mul(gate_up, out, pdl=self._pdl)
        return out

    def linear_silu_and_mul(
        self, x: Rows, weight: Weight, bias: Tensor | None = None, codes: torch.dtype | None = None
    ) -> Rows:
        if not isinstance(weight, Tensor):
            return self._packed[type(weight)].silu_and_mul(x, weight, bias, codes)
        assert isinstance(x, Tensor)
        return self._dense.silu_and_mul(x, weight, bias)

    def linear_add_rms_norm(
        self,
        x: Rows,
        weight: Weight,
        bias: Tensor | None,
        residual: Tensor,
        norm_weight: Tensor,
        eps: float,
        codes: torch.dtype | None = None,
    ) -> Rows:
        if not isinstance(weight, Tensor):
            return self._packed[type(weight)].add_rms_norm(x, weight, bias, residual, norm_weight, eps, codes)
        assert isinstance(x, Tensor)
        return self._dense.add_rms_norm(x, weight, bias, residual, norm_weight, eps)

    def linear_lora(
        self, x: Tensor, weight: Weight, bias: Tensor | None, layer: LoraLayer, rows: LoraRows
    ) -> Tensor:
        if isinstance(weight, Tensor):
            joined = self._dense.with_updates(x, weight, bias, layer, rows)
            if joined is not None:
                return joined
        if self._side_stream is None:
            y = self.linear(x, weight, bias)
            add_lora(y, x, bias, layer, rows, pdl=self._pdl)
            return y
        # Shrink waits for memory most of its time and needs x alone: it runs beside the product.
        stream = torch.cuda.current_stream()
        self._side_stream.wait_stream(stream)
        with torch.cuda.stream(self._side_stream):
            hidden = shrink(x, layer, rows)
        y = self.linear(x, weight, bias)
        stream.wait_stream(self._side_stream)
        expand(y, bias, hidden, layer, rows)
        return y

    def linear_lora_silu_and_mul(
        self, x: Tensor, weight: Weight, bias: Tensor | None, layer: LoraLayer, rows: LoraRows
    ) -> Tensor:
        if isinstance(weight, Tensor):
            joined = self._dense.with_updates(x, weight, bias, layer, rows, silu=True)
            if joined is not None:
                return joined
        return self.silu_and_mul(self.linear_lora(x, weight, bias, layer, rows))

    def linear_lora_add_rms_norm(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        residual: Tensor,
        norm_weight: Tensor,
        eps: float,
        layer: LoraLayer,
        rows: LoraRows,
    ) -> Tensor:
        product = None
        if isinstance(weight, Tensor):
            product = self._dense.with_updates(x, weight, bias, layer, rows, may_split=True)
        if product is None:
            product = self.linear_lora(x, weight, bias, layer, rows)
        out = torch.empty_like(residual)
        rms_norm(product, norm_weight, eps, out, residual=residual, pdl=self._pdl)
        return out

    def plan_attention(
        self, metadata: AttentionMetadata, *, dtype: torch.dtype, sliding_window: int | None = None
    ) -> AttentionPlan:
        del dtype
        return plan_attention(metadata, sliding_window)

    def rotary_embed_and_store_kv(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, plan: AttentionPlan
    ) -> None:
        rotary_embed_and_store_kv(qkv, cos, sin, cache, plan.slots, pdl=self._pdl)

    def paged_attention(
        self, q: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float, soft_cap: float | None = None
    ) -> Tensor:
        return self._attention(q, cache, plan, scale, soft_cap)
