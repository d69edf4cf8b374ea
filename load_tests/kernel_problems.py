"""The operands on which kernels are tuned and timed: shapes of Mistral-7B, fresh random values, more than L2 holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trident_llm.kernels.decode_attention import allocate_workspace, decode_attention
from trident_llm.kernels.layer_cache import LayerCache
from trident_llm.kernels.matmul_hopper import matmul_hopper
from trident_llm.kernels.matrix_vector import matrix_vector
from trident_llm.kernels.packed_bytes import pack_bytes
from trident_llm.kernels.packed_weight import pack
from trident_llm.kernels.prefill_attention import prefill_attention
from trident_llm.kernels.prefill_attention_hopper import HopperConfig, prefill_attention_hopper
from trident_llm.kernels.quantize_rows import quantize_rows
from trident_llm.kernels.quantized_matmul import quantized_matmul
from trident_llm.kernels.quantized_matmul_hopper import quantized_matmul_hopper
from trident_llm.kernels.quantized_vector import quantized_vector
from trident_llm.kernels.quantized_weight import QuantizedWeight
from trident_llm.kernels.scaled_matmul import scaled_matmul
from trident_llm.kernels.scaled_matmul_hopper import scaled_matmul_hopper
from trident_llm.kernels.skinny_matmul import skinny_matmul
from trident_llm.kernels.unpack_weight import unpack_weight
from trident_llm.quantization import fp8, smoothquant

LINEAR_SHAPES = {
    "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (32000, 4096),
}  # fmt: skip
COLD_BYTES = 600e6
"""Operands of one timing together: ten times the L2 cache."""

EIGHT_BITS: dict[str, Callable[[Tensor], QuantizedWeight]] = {"int8": smoothquant.quantize, "fp8": fp8.quantize}
Launch = Callable[[], None]


def random_tensor(device: str, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    if device == "cpu":
        return torch.empty(shape, dtype=dtype)
    return torch.randn(shape, dtype=dtype, device=device) * scale


@dataclass
class Linear:
    """x [rows, in] by a weight of Mistral-7B, in several copies."""

    name: str
    rows: int
    silu: bool = False

    def prepare(self, device: str) -> None:
        num_outputs, num_inputs = LINEAR_SHAPES[self.name]
        self.num_bytes = num_outputs * num_inputs * 2
        self.flops = 2 * self.rows * num_outputs * num_inputs
        copies = 1 if device == "cpu" else max(4, int(COLD_BYTES / self.num_bytes))
        self.weights = [random_tensor(device, num_outputs, num_inputs, scale=0.02) for _ in range(copies)]
        self.x = random_tensor(device, self.rows, num_inputs)

    def release(self) -> None:
        release(self)

    def launches(self, kind: str, config: Any, pdl: bool = True, num_processors: int = 132) -> list[Launch]:
        """num_processors: of the device, for the kind that is Hopper's."""
        num_outputs = self.weights[0].shape[0] // (2 if self.silu else 1)
        num_splits = getattr(config, "num_splits", 1)
        out = self.x.new_empty(self.rows, num_outputs)
        if num_splits > 1:
            out = torch.empty(num_splits, *out.shape, dtype=torch.float32, device=out.device)
        self.out = out
        if kind == "cublas":
            return [lambda w=w: torch.mm(self.x, w.T, out=out) for w in self.weights]
        kernel = {
            "matrix_vector": matrix_vector,
            "skinny": skinny_matmul,
            "hopper": partial(matmul_hopper, num_processors=num_processors),
        }[kind]
        return [
            lambda w=w: kernel(self.x, w, out, silu_and_mul=self.silu, config=config, pdl=pdl) for w in self.weights
        ]

    def error(self) -> float:
        """Relative error of what the last launch wrote; the reference is a float32 product."""
        return _product_error(self.out, self.x, self.weights[-1], silu=self.silu)

    def poison(self) -> None:
        self.out.fill_(float("nan"))


@dataclass
class QuantizedLinear:
    """x [rows, in] by a quantized weight of Mistral-7B with random codes, in several copies."""

    name: str
    rows: int
    bits: int = 4
    group_size: int = 128
    silu: bool = False
    activations: str = "none"
    """As in QuantizedWeight; with others ``bits`` is 8."""

    def prepare(self, device: str) -> None:
        num_outputs, num_inputs = LINEAR_SHAPES[self.name]
        self.flops = 2 * self.rows * num_outputs * num_inputs
        num_bytes = num_outputs * num_inputs * self.bits / 8
        copies = 1 if device == "cpu" else max(4, int(COLD_BYTES / num_bytes))
        weight = self._random_weight(device)
        self.reference = weight.dequantize(torch.bfloat16)
        packed = pack(weight) if self.activations == "none" else pack_bytes(weight)
        self.num_bytes = packed.nbytes
        tensors = {f.name: getattr(packed, f.name) for f in fields(packed)}
        copied = [name for name, value in tensors.items() if isinstance(value, Tensor)]
        self.weights = [packed] + [
            replace(packed, **{name: tensors[name].clone() for name in copied}) for _ in range(copies - 1)
        ]
        self.x = random_tensor(device, self.rows, num_inputs)

    def _random_weight(self, device: str) -> QuantizedWeight:
        num_outputs, num_inputs = LINEAR_SHAPES[self.name]
        if self.activations != "none":
            values = random_tensor(device, num_outputs, num_inputs, scale=0.02).float()
            return EIGHT_BITS[self.activations](values)
        levels = 2**self.bits
        groups = (num_outputs, num_inputs // self.group_size)
        codes = torch.randint(0, levels, (num_outputs, num_inputs), dtype=torch.uint8, device=device)
        zeros = torch.randint(levels // 2 - 2, levels // 2 + 2, groups, dtype=torch.int32, device=device)
        scales = (torch.rand(groups, device=device) + 0.5) * 0.08 / levels
        return QuantizedWeight(codes, scales, zeros.to(torch.uint8), self.bits, self.group_size)

    def release(self) -> None:
        release(self)

    def launches(self, kind: str, config: Any, pdl: bool = True, num_processors: int = 132) -> list[Launch]:
        """num_processors: of the device, for kinds that are Hopper's."""
        num_outputs = self.weights[0].shape[0] // (2 if self.silu else 1)
        if kind == "unpack":
            self.out = self.x.new_empty(self.weights[0].shape)
            return [lambda w=w: unpack_weight(w, self.out, pdl=pdl) for w in self.weights]
        self.out = self.x.new_empty(self.rows, num_outputs)
        if kind == "vector":
            return [
                lambda w=w: quantized_vector(self.x, w, self.out, silu_and_mul=self.silu, config=config, pdl=pdl)
                for w in self.weights
            ]
        if getattr(config, "num_splits", 1) > 1:
            self.out = torch.empty(config.num_splits, *self.out.shape, dtype=torch.float32, device=self.x.device)
        if kind in ("scaled", "hopper_scaled"):
            x = quantize_rows(self.x, self.weights[0].codes.dtype)
            scaled = (
                scaled_matmul if kind == "scaled" else partial(scaled_matmul_hopper, num_processors=num_processors)
            )
            return [lambda w=w: scaled(x, w, self.out, config=config, pdl=pdl) for w in self.weights]
        multiply = (
            partial(quantized_matmul_hopper, num_processors=num_processors) if kind == "hopper" else quantized_matmul
        )
        return [
            lambda w=w: multiply(self.x, w, self.out, silu_and_mul=self.silu, config=config, pdl=pdl)
            for w in self.weights
        ]

    def error(self) -> float:
        """As ``Linear.error``."""
        if self.out.shape == self.reference.shape:
            return relative_error(self.out, self.reference.float())
        return _product_error(self.out, self.x, self.reference, silu=self.silu)

    def poison(self) -> None:
        self.out.fill_(float("nan"))


class _Paged:
    """A cache with shuffled blocks for S sequences of ``context`` tokens."""

    num_bytes = 0.0
    flops = 0.0

    def _prepare_cache(self, device: str, num_seqs: int, context: int, heads: tuple[int, int], head_dim: int) -> None:
        blocks = -(-context // 16)
        self.cache = random_tensor(device, num_seqs * blocks, 16, 2, heads[1], head_dim)
        order = torch.randperm(num_seqs * blocks, device=device)
        self.tables = order.to(torch.int32).view(num_seqs, blocks)
        self.context_lens = torch.full((num_seqs,), context, dtype=torch.int32, device=device)
        self.seq_counts = torch.tensor([0, num_seqs], dtype=torch.int32, device=device)

    def release(self) -> None:
        release(self)

    def _gathered(self, seq: int) -> Tensor:
        """[2, Hq, N, D] float32 K and V of one sequence, repeated for the query heads."""
        kv = self.cache[self.tables[seq].long()].flatten(0, 1)[: int(self.context_lens[seq])]
        return kv.float().permute(1, 2, 0, 3).repeat_interleave(self.q.shape[1] // kv.shape[2], 1)

    def poison(self) -> None:
        self.out.fill_(float("nan"))


@dataclass
class Decode(_Paged):
    num_seqs: int
    context: int
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128

    def prepare(self, device: str) -> None:
        self._prepare_cache(device, self.num_seqs, self.context, self.heads, self.head_dim)
        self.seq_counts.fill_(self.num_seqs)
        self.q = random_tensor(device, self.num_seqs, self.heads[0], self.head_dim)
        self.out = torch.empty_like(self.q)
        self.num_bytes = self.num_seqs * self.context * 2 * self.heads[1] * self.head_dim * 2
        # Short caches are repeated at other places, so that they are read from memory and not from L2.
        copies = 1 if device == "cpu" else max(1, min(64, int(COLD_BYTES / self.num_bytes)))
        self.caches = [self.cache] + [self.cache.clone() for _ in range(copies - 1)]

    def launches(self, config: Any, num_splits: int, pdl: bool = True) -> list[Launch]:
        workspace = allocate_workspace(self.num_seqs, self.heads[0], num_splits, self.head_dim, self.q.device)
        return [
            lambda cache=cache: decode_attention(
                self.q, LayerCache(cache), self.tables, self.context_lens, self.seq_counts, self.out, workspace,
                num_splits=num_splits, scale=self.head_dim**-0.5, config=config, pdl=pdl,
            )
            for cache in self.caches
        ]  # fmt: skip

    def error(self) -> float:
        k, v = self._gathered(self.num_seqs - 1)
        scores = torch.einsum("hd,hnd->hn", self.q[-1].float(), k) * self.head_dim**-0.5
        return relative_error(self.out[-1], torch.einsum("hn,hnd->hd", torch.softmax(scores, -1), v))


@dataclass
class Prefill(_Paged):
    """One prompt computed whole: causal, so half of the products count."""

    tokens: int
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128

    def prepare(self, device: str) -> None:
        self._prepare_cache(device, 1, self.tokens, self.heads, self.head_dim)
        self.q = random_tensor(device, self.tokens, self.heads[0], self.head_dim)
        self.out = torch.empty_like(self.q)
        self.starts = torch.tensor([0, self.tokens], dtype=torch.int32, device=device)
        self.flops = 2 * self.tokens * self.tokens * self.heads[0] * self.head_dim

    def launches(self, config: Any, pdl: bool = True, num_processors: int = 132) -> list[Launch]:
        """num_processors: of the device; read with a HopperConfig, which stands for the kernel that is Hopper's own."""
        kernel = prefill_attention
        if isinstance(config, HopperConfig):
            kernel = partial(prefill_attention_hopper, num_processors=num_processors)
        launch = lambda: kernel(  # noqa: E731
            self.q, LayerCache(self.cache), self.tables, self.starts, self.context_lens, self.seq_counts, self.out,
            max_tokens=self.tokens, max_seqs=1, scale=self.head_dim**-0.5, config=config, pdl=pdl,
        )  # fmt: skip
        return [launch] * 3

    def error(self) -> float:
        """Of the last 64 rows."""
        k, v = self._gathered(0)
        scores = torch.einsum("mhd,hnd->hmn", self.q[-64:].float(), k) * self.head_dim**-0.5
        positions = torch.arange(self.tokens, device=scores.device)
        scores.masked_fill_(positions[None, :] > positions[-64:, None], float("-inf"))
        return relative_error(self.out[-64:], torch.einsum("hmn,hnd->mhd", torch.softmax(scores, -1), v))


def release(problem: object) -> None:
    """Free the operands; a problem that is listed again is prepared again."""
    for name in [name for name, value in vars(problem).items() if isinstance(value, (list, Tensor))]:
        delattr(problem, name)
    torch.cuda.empty_cache()


def _product_error(out: Tensor, x: Tensor, weight: Tensor, *, silu: bool) -> float:
    """out: [T, out], or parts of it that add up."""
    product = x.float() @ weight.float().T
    if silu:
        gate, up = product.chunk(2, -1)
        product = torch.nn.functional.silu(gate) * up
    return relative_error(out if out.dim() == 2 else out.sum(0), product)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()
