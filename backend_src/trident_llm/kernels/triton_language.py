"""The decoder's operators in the Triton language, for NVIDIA GPUs; signatures and meanings are those of ``Kernels``.

Every launch depends on shapes alone, never on values, so a step can be captured into a CUDA graph: lengths, block
tables and slots are read on the device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.batch import AttentionMetadata
from . import matrix_vector, skinny_matmul
from .checks import HALF_DTYPES
from .layer_cache import LayerCache
from .lora import add_lora, expand, joined_split, shrink
from .lora_layer import LoraLayer, LoraRows
from .lora_updates import Updates, takes_updates
from .matrix_vector import matrix_vector as multiply_vector
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
from .skinny_matmul import skinny_matmul as multiply_skinny
from .step_attention import AttentionPlan, StepAttention, plan_attention

_MAX_STREAMED_ROWS = 64
"""With more rows cuBLAS multiplies: a single pass over the weight no longer decides the time."""
_LONG_INPUTS = 8192
"""A kernel that splits so long a sum holds out against cuBLAS up to twice as many rows."""
_MAX_ADDED_INPUTS = 1 << 24
"""Elements of x up to which it pays to let cuBLAS add the residual. H100, 256 rows of 14,336: 63.7 instead of 64.5 us
with the norm; 2,048 rows of 4,096: 101 instead of 111; 2,048 rows of 14,336: 320 instead of 317."""

_HALVED_ROWS = range(skinny_matmul.MAX_ROWS + 1, 385)
"""Rows for which a long sum is worth halving, because cuBLAS takes small tiles for whole ones. H100, 14,336 inputs,
4,096 outputs, us for 256, 320, 384 and 512 rows: 61, 68, 87 and 80 with the residual added, 55, 59, 67 and 84 as two
halves in float32."""

Weight = Tensor | PackedWeight | PackedBytes


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a product is one of 16-bit matrices alone."""
    return bias is None and weight.dtype == x.dtype and x.dtype in HALF_DTYPES


def _most_split_rows(num_inputs: int) -> int:
    """Rows up to which our kernel shares long sums out."""
    return skinny_matmul.MAX_ROWS if num_inputs >= _LONG_INPUTS else _MAX_STREAMED_ROWS


def _halves_sums(num_rows: int, num_inputs: int) -> bool:
    """Whether cuBLAS is given a product as two of half the inputs."""
    return num_inputs >= _LONG_INPUTS and num_inputs % 2 == 0 and num_rows in _HALVED_ROWS


def _streams_weight(x: Tensor, weight: Tensor, max_rows: int) -> bool:
    """Whether a kernel for few rows takes these operands; cuBLAS takes the rest."""
    return x.dim() == 2 and 1 <= x.shape[0] <= max_rows and x.dtype in HALF_DTYPES and weight.dtype == x.dtype


def _joins_updates(
    x: Tensor, weight: Weight, layer: LoraLayer, config: skinny_matmul.SkinnyConfig, max_rows: int
) -> bool:
    """Whether one kernel makes the product and adds low-rank updates to it."""
    if not isinstance(weight, Tensor) or x.shape[0] <= matrix_vector.MAX_ROWS:
        return False
    return _streams_weight(x, weight, max_rows) and takes_updates(layer, config.tile_outputs)


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
        if not _streams_weight(x, weight, _MAX_STREAMED_ROWS):
            return F.linear(x, weight, bias)
        out = x.new_empty(x.shape[0], weight.shape[0])
        if x.shape[0] <= matrix_vector.MAX_ROWS:
            multiply_vector(x, weight, out, bias=bias, pdl=self._pdl)
        else:
            multiply_skinny(x, weight, out, bias=bias, pdl=self._pdl)
        return out

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
        # What the fusion saves outweighs what cuBLAS is faster.
        if bias is not None or not _streams_weight(x, weight, skinny_matmul.MAX_ROWS):
            return self.silu_and_mul(self.linear(x, weight, bias))
        out = x.new_empty(x.shape[0], weight.shape[0] // 2)
        multiply = multiply_vector if x.shape[0] <= matrix_vector.MAX_ROWS else multiply_skinny
        multiply(x, weight, out, silu_and_mul=True, pdl=self._pdl)
        return out

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
        if self._adds_residual(x, weight, bias):
            # cuBLAS adds the residual where it writes: the norm then reads one tensor instead of two.
            return self.rms_norm(residual.addmm_(x, weight.t()), norm_weight, eps)
        out = torch.empty_like(residual)
        rms_norm(self._product(x, weight, bias), norm_weight, eps, out, residual=residual, pdl=self._pdl)
        return out

    def _product(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """``linear`` for a norm that adds up parts: [T, out], or [P, T, out] float32 where programs share the sums."""
        if not isinstance(weight, Tensor):
            return self._packed[type(weight)].product(x, weight, bias)
        if not _is_plain(x, weight, bias):
            return self.linear(x, weight, bias)
        (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
        if matrix_vector.MAX_ROWS < num_rows <= _most_split_rows(num_inputs):
            config = skinny_matmul.default_config(num_rows, num_outputs, may_split=True)
            parts = torch.empty(config.num_splits, num_rows, num_outputs, dtype=torch.float32, device=x.device)
            multiply_skinny(x, weight, parts, config=config, pdl=self._pdl)
            return parts
        if _halves_sums(num_rows, num_inputs):
            halves = x.view(num_rows, 2, -1).transpose(0, 1)
            return torch.bmm(halves, weight.view(num_outputs, 2, -1).permute(1, 2, 0), out_dtype=torch.float32)
        return self.linear(x, weight, bias)

    @staticmethod
    def _adds_residual(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        num_rows, num_inputs = x.shape
        many = num_rows > _most_split_rows(num_inputs) and not _halves_sums(num_rows, num_inputs)
        return _is_plain(x, weight, bias) and many and x.numel() <= _MAX_ADDED_INPUTS

    def linear_lora(
        self, x: Tensor, weight: Weight, bias: Tensor | None, layer: LoraLayer, rows: LoraRows
    ) -> Tensor:
        config = skinny_matmul.default_config(x.shape[0], weight.shape[0])
        if _joins_updates(x, weight, layer, config, _MAX_STREAMED_ROWS):
            out = x.new_empty(x.shape[0], weight.shape[0])
            return self._multiply_joined(x, weight, out, layer, rows, config=config, bias=bias)
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
        num_outputs = weight.shape[0] // 2
        config = skinny_matmul.default_config(x.shape[0], num_outputs, silu_and_mul=True)
        if bias is not None or not _joins_updates(x, weight, layer, config, skinny_matmul.MAX_ROWS):
            return self.silu_and_mul(self.linear_lora(x, weight, bias, layer, rows))
        out = x.new_empty(x.shape[0], num_outputs)
        return self._multiply_joined(x, weight, out, layer, rows, config=config, silu_and_mul=True)

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
        out = torch.empty_like(residual)
        num_rows, num_inputs = x.shape
        config = skinny_matmul.default_config(num_rows, weight.shape[0], may_split=True)
        if bias is None and _joins_updates(x, weight, layer, config, _most_split_rows(num_inputs)):
            parts = torch.empty(config.num_splits, num_rows, weight.shape[0], dtype=torch.float32, device=x.device)
            product = self._multiply_joined(x, weight, parts, layer, rows, config=config)
        else:
            product = self.linear_lora(x, weight, bias, layer, rows)
        rms_norm(product, norm_weight, eps, out, residual=residual, pdl=self._pdl)
        return out

    def _multiply_joined(
        self, x: Tensor, weight: Weight, out: Tensor, layer: LoraLayer, rows: LoraRows, **options: Any
    ) -> Tensor:
        """``skinny_matmul`` with updates, into out."""
        assert isinstance(weight, Tensor)
        hidden = shrink(x, layer, rows, inputs_per_split=joined_split(x.shape[1], weight.shape[0]), pdl=self._pdl)
        multiply_skinny(x, weight, out, updates=Updates(layer, rows, hidden), pdl=self._pdl, **options)
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
