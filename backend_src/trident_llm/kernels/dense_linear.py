"""Linear layers of plain weights: which kernel multiplies how many rows, and with what fused.

The operations and their meanings are those of ``Kernels``.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from . import matmul_hopper, matrix_vector, skinny_matmul
from .checks import HALF_DTYPES
from .lora import joined_split, shrink
from .lora_layer import LoraLayer, LoraRows
from .lora_updates import Updates, takes_updates
from .matmul_hopper import HopperProductConfig
from .matmul_hopper import matmul_hopper as multiply_hopper
from .matrix_vector import MatrixVectorConfig
from .matrix_vector import matrix_vector as multiply_vector
from .rms_norm import rms_norm
from .silu_and_mul import silu_and_mul
from .skinny_matmul import SkinnyConfig
from .skinny_matmul import skinny_matmul as multiply_skinny

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

Config: TypeAlias = MatrixVectorConfig | SkinnyConfig | HopperProductConfig


class DenseLinear:
    """Holds no tensors. pdl: whether the device knows programmatic dependent launch. hopper_processors: its
    multiprocessors if it has Hopper's matrix instructions, else 0."""

    def __init__(self, *, pdl: bool, hopper_processors: int = 0) -> None:
        self._pdl = pdl
        self._hopper_processors = hopper_processors

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        config = self._config(x, weight)
        if config is None:
            return F.linear(x, weight, bias)
        out = x.new_empty(x.shape[0], weight.shape[0])
        self._multiply(x, weight, out, config, bias=bias)
        return out

    def silu_and_mul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0] // 2)
        config = self._config(x, weight, silu=True) if bias is None else None
        if config is None:
            silu_and_mul(self.linear(x, weight, bias), out, pdl=self._pdl)
        else:
            self._multiply(x, weight, out, config, silu_and_mul=True)
        return out

    def add_rms_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, eps: float
    ) -> Tensor:
        out = torch.empty_like(residual)
        is_plain = bias is None and weight.dtype == x.dtype and x.dtype in HALF_DTYPES
        config = self._config(x, weight, may_split=True) if is_plain else None
        if is_plain and config is None and self._adds_residual(x):
            # cuBLAS adds the residual where it writes: the norm then reads one tensor instead of two.
            rms_norm(residual.addmm_(x, weight.t()), norm_weight, eps, out, pdl=self._pdl)
            return out
        if config is not None and not isinstance(config, MatrixVectorConfig):
            product = self._parts(x, weight, config)
        elif is_plain and config is None and _halves_sums(*x.shape):
            halves = x.view(x.shape[0], 2, -1).transpose(0, 1)
            product = torch.bmm(halves, weight.view(weight.shape[0], 2, -1).permute(1, 2, 0), out_dtype=torch.float32)
        else:
            product = self.linear(x, weight, bias)
        rms_norm(product, norm_weight, eps, out, residual=residual, pdl=self._pdl)
        return out

    def with_updates(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: LoraLayer,
        rows: LoraRows,
        *,
        silu: bool = False,
        may_split: bool = False,
    ) -> Tensor | None:
        """The product and what ``rows`` take of its low-rank updates by one kernel: ``linear``, ``silu_and_mul`` or,
        with may_split, ``linear`` or parts of its sums in float32, [P, T, out]. None: there is no such kernel."""
        config = self._joining_config(x, weight, layer, silu=silu, may_split=may_split)
        if config is None or (bias is not None and (silu or config.num_splits > 1)):
            return None
        num_outputs = weight.shape[0] // (2 if silu else 1)
        out = x.new_empty(x.shape[0], num_outputs) if not may_split else self._empty_parts(x, num_outputs, config)
        hidden = shrink(
            x, layer, rows, inputs_per_split=joined_split(x.shape[1], num_outputs),
            fill=isinstance(config, HopperProductConfig), pdl=self._pdl,
        )  # fmt: skip
        updates = Updates(layer, rows, hidden)
        self._multiply(x, weight, out, config, bias=bias, silu_and_mul=silu, updates=updates)
        return out

    def _config(
        self, x: Tensor, weight: Tensor, *, silu: bool = False, may_split: bool = False
    ) -> Config | None:
        """Of the kernel that multiplies; None: cuBLAS does."""
        if x.dim() != 2 or not len(x) or x.dtype not in HALF_DTYPES or weight.dtype != x.dtype:
            return None
        num_rows, num_inputs = x.shape
        if num_rows <= matrix_vector.MAX_ROWS:
            return matrix_vector.default_config(num_rows, num_inputs)
        num_outputs = weight.shape[0] // (2 if silu else 1)
        if self._is_for_hopper(x, weight, silu):
            return matmul_hopper.default_config(
                num_rows, num_outputs, num_inputs, self._hopper_processors, silu_and_mul=silu, may_split=may_split
            )
        return _skinny_config(num_rows, num_outputs, num_inputs, silu=silu, may_split=may_split)

    def _joining_config(
        self, x: Tensor, weight: Tensor, layer: LoraLayer, *, silu: bool, may_split: bool
    ) -> SkinnyConfig | HopperProductConfig | None:
        (num_rows, num_inputs), halves = x.shape, 2 if silu else 1
        num_outputs = weight.shape[0] // halves
        if not num_rows or x.dtype not in HALF_DTYPES or weight.dtype != x.dtype:
            return None
        if self._is_for_hopper(x, weight, silu):
            config = matmul_hopper.default_config(
                num_rows, num_outputs, num_inputs, self._hopper_processors, silu_and_mul=silu, may_split=may_split,
                has_updates=True,
            )  # fmt: skip
            if config is not None and matmul_hopper.takes_updates(layer, config.tile_outputs // halves):
                return config
        if num_rows <= matrix_vector.MAX_ROWS:
            return None
        plain = _skinny_config(num_rows, num_outputs, num_inputs, silu=silu, may_split=may_split)
        return plain if plain is not None and takes_updates(layer, plain.tile_outputs) else None

    def _is_for_hopper(self, x: Tensor, weight: Tensor, silu: bool) -> bool:
        return self._hopper_processors > 0 and matmul_hopper.takes(x, weight, silu_and_mul=silu)

    def _multiply(self, x: Tensor, weight: Tensor, out: Tensor, config: Config, **options: Any) -> None:
        if isinstance(config, MatrixVectorConfig):
            multiply_vector(x, weight, out, config=config, pdl=self._pdl, **options)
        elif isinstance(config, SkinnyConfig):
            multiply_skinny(x, weight, out, config=config, pdl=self._pdl, **options)
        else:
            multiply_hopper(
                x, weight, out, num_processors=self._hopper_processors, config=config, pdl=self._pdl, **options
            )

    def _parts(self, x: Tensor, weight: Tensor, config: SkinnyConfig | HopperProductConfig) -> Tensor:
        """The product [T, out], or [P, T, out] float32 where programs share the sums."""
        parts = self._empty_parts(x, weight.shape[0], config)
        self._multiply(x, weight, parts, config)
        return parts

    @staticmethod
    def _empty_parts(x: Tensor, num_outputs: int, config: SkinnyConfig | HopperProductConfig) -> Tensor:
        if config.num_splits == 1:
            return x.new_empty(x.shape[0], num_outputs)
        return torch.empty(config.num_splits, x.shape[0], num_outputs, dtype=torch.float32, device=x.device)

    @staticmethod
    def _adds_residual(x: Tensor) -> bool:
        return not _halves_sums(*x.shape) and x.numel() <= _MAX_ADDED_INPUTS


def _skinny_config(
    num_rows: int, num_outputs: int, num_inputs: int, *, silu: bool, may_split: bool
) -> SkinnyConfig | None:
    # What fusing SiLU saves, and sharing long sums out, outweighs what cuBLAS is faster.
    long = silu or (may_split and num_inputs >= _LONG_INPUTS)
    if num_rows > (skinny_matmul.MAX_ROWS if long else _MAX_STREAMED_ROWS):
        return None
    return skinny_matmul.default_config(num_rows, num_outputs, silu_and_mul=silu, may_split=may_split)


def _halves_sums(num_rows: int, num_inputs: int) -> bool:
    """Whether cuBLAS is given a product as two of half the inputs."""
    return num_inputs >= _LONG_INPUTS and num_inputs % 2 == 0 and num_rows in _HALVED_ROWS
