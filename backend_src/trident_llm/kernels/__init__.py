"""The decoder's operators: one set of signatures, and the choice of implementation for a device.

Knows tensors and the paged KV cache; neither models nor scheduling. Shapes: T tokens of a step, Hq query heads, Hkv
KV heads, D head_dim.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..engine.batch import AttentionMetadata
from .layer_cache import LayerCache
from .lora_layer import LoraLayer, LoraRows
from .quantized_rows import Rows
from .quantized_weight import QuantizedWeight


class Kernels(Protocol):
    """What an implementation offers. Chosen once, at start, by ``kernels_for``."""

    def pack_linear(self, weight: Tensor | QuantizedWeight) -> Any:
        """Bring a weight [out, in] into the layout that ``linear`` of this implementation reads.

        The packed weight is opaque to the caller, but for ``nbytes``.
        """

    def input_codes(self, weight: Any, num_rows: int, dtype: torch.dtype) -> torch.dtype | None:
        """The 8-bit dtype to which ``linear`` brings x [num_rows, in] of ``dtype``; None: it reads x as it is.

        x may then come as QuantizedRows of that dtype.
        """

    def linear(self, x: Rows, weight: Any, bias: Tensor | None = None) -> Tensor:
        """x [T, in] times a packed weight, plus bias [out] -> [T, out]. See ``input_codes``."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension, computed in float32; x [..., H], weight [H]. Zhang and Sennrich 2019."""

    def fused_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add x [T, H] to residual [T, H] in place; return the norm of the sum."""

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2 * I], gate first -> silu(gate) * up, [T, I]."""

    def linear_silu_and_mul(
        self, x: Rows, weight: Any, bias: Tensor | None = None, codes: torch.dtype | None = None
    ) -> Rows:
        """``silu_and_mul(linear(x, weight, bias))``, in one kernel where that is faster.

        codes: what the layer that reads the result brings it to; it comes as QuantizedRows of that dtype where a
        kernel writes these in the same pass, with the same numbers.
        """

    def linear_add_rms_norm(
        self,
        x: Rows,
        weight: Any,
        bias: Tensor | None,
        residual: Tensor,
        norm_weight: Tensor,
        eps: float,
        codes: torch.dtype | None = None,
    ) -> Rows:
        """``fused_add_rms_norm(linear(x, weight, bias), residual, norm_weight, eps)``, likewise."""

    def linear_lora(
        self, x: Tensor, weight: Any, bias: Tensor | None, layer: LoraLayer, rows: LoraRows
    ) -> Tensor:
        """``linear(x, weight, bias)`` plus what ``rows`` take of the updates in ``layer``."""

    def linear_lora_silu_and_mul(
        self, x: Tensor, weight: Any, bias: Tensor | None, layer: LoraLayer, rows: LoraRows
    ) -> Tensor:
        """``silu_and_mul(linear_lora(...))``, in one kernel where that is faster."""

    def linear_lora_add_rms_norm(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None,
        residual: Tensor,
        norm_weight: Tensor,
        eps: float,
        layer: LoraLayer,
        rows: LoraRows,
    ) -> Tensor:
        """``fused_add_rms_norm(linear_lora(...), residual, norm_weight, eps)``, likewise."""

    def plan_attention(
        self, metadata: AttentionMetadata, *, dtype: torch.dtype, sliding_window: int | None = None
    ) -> Any:
        """Everything about a step's attention that no layer changes. The plan is opaque to the caller.

        dtype: of the queries. sliding_window: keys a query sees, itself included; None for all.
        """

    def rotary_embed_and_store_kv(self, qkv: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, plan: Any) -> None:
        """Rotate the q and k heads of qkv [T, Hq + 2 * Hkv, D] in place and write k and v to the cache.

        cos, sin: [T, 1, D], already gathered by position (once a step, for all layers), with the first half of sin
        negated: rotated[d] = x[d] * cos[d] + x[(d + D/2) % D] * sin[d]. A token whose slot is -1 is not written.
        With 8 bits each head of a token gets a scale for k and one for v, by which its largest value becomes the limit.
        """

    def paged_attention(
        self, q: Tensor, cache: LayerCache, plan: Any, scale: float, soft_cap: float | None = None
    ) -> Tensor:
        """Causal attention of q [T, Hq, D] over each sequence's blocks -> [T, Hq * D]; softmax in float32.

        Query head h reads KV head h // (Hq / Hkv). soft_cap: scores become soft_cap * tanh(score / soft_cap).
        """


def kernels_for(device: torch.device) -> Kernels:
    """The implementation for a device: kernels in the Triton language on a GPU, else their torch twins."""
    if device.type == "cuda":
        from .triton_language import TritonLanguageKernels

        return TritonLanguageKernels.for_device(device)
    from . import reference

    return cast(Kernels, reference)
