"""What a request may do to its logits before a draw: forbidden tokens, biases, penalties. Counts live on the device.

The order is that of ``sampling.sampler``: forbidden tokens, logit bias, repetition, frequency and presence penalty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape

_TILE = 1024


@dataclass(frozen=True)
class AdjustmentTensors:
    """Parameters of R rows, on the device."""

    slot: Tensor
    """[R] int32: the row's line in ``output_counts`` and ``in_prompt``; -1: no penalties."""
    repetition_penalty: Tensor
    """[R] float32; 1: none."""
    frequency_penalty: Tensor
    """[R] float32."""
    presence_penalty: Tensor
    """[R] float32."""
    num_biases: Tensor
    """[R] int32: entries used of the row in ``bias_ids`` and ``bias_values``."""
    bias_ids: Tensor
    """[R, B] int32."""
    bias_values: Tensor
    """[R, B] float32, added to the logits of ``bias_ids``; -inf forbids a token."""


@triton.jit
def _adjust_logits_kernel(
    logits,  # [R, vocab_size]
    out,  # [R, vocab_size] float32, written
    slots,  # [R] int32
    output_counts,  # [slots, vocab_size] int32
    in_prompt,  # [slots, vocab_size] uint8
    repetition_penalties,  # [R] float32
    frequency_penalties,  # [R] float32
    presence_penalties,  # [R] float32
    num_biases,  # [R] int32
    bias_ids,  # [R, max_biases] int32
    bias_values,  # [R, max_biases] float32
    vocab_size,
    stride_logits,
    stride_out,
    stride_counts,
    stride_prompt,
    stride_bias,
    TILE: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    ids = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = ids < vocab_size
    x = tl.load(logits + row * stride_logits + ids, mask=inside, other=0.0).to(tl.float32)
    for entry in range(tl.load(num_biases + row)):
        bias_id = tl.load(bias_ids + row * stride_bias + entry)
        x += tl.where(ids == bias_id, tl.load(bias_values + row * stride_bias + entry), 0.0)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        counts = tl.load(output_counts + slot * stride_counts + ids, mask=inside, other=0)
        prompt = tl.load(in_prompt + slot * stride_prompt + ids, mask=inside, other=0)
        repetition = tl.load(repetition_penalties + row)
        seen = (counts > 0) | (prompt > 0)
        x = tl.where(seen, tl.where(x > 0, x / repetition, x * repetition), x)
        x -= tl.load(frequency_penalties + row) * counts.to(tl.float32)
        x -= tl.where(counts > 0, tl.load(presence_penalties + row), 0.0)
    tl.store(out + row * stride_out + ids, x, mask=inside)


def adjust_logits(
    logits: Tensor, out: Tensor, params: AdjustmentTensors, output_counts: Tensor, in_prompt: Tensor
) -> None:
    """Write the adjusted logits [R, vocab] to out [R, vocab] float32, which may be ``logits`` itself.

    output_counts [slots, vocab] int32: how often each token was generated; in_prompt [slots, vocab] uint8: 1 for the
    tokens of the prompt.
    """
    num_rows, vocab_size = logits.shape
    check_dtype("logits", logits, FLOAT_DTYPES)
    check_shape("out", out, (num_rows, vocab_size))
    check_dtype("out", out, (torch.float32,))
    check_shape("output_counts", output_counts, (-1, vocab_size))
    check_dtype("output_counts", output_counts, (torch.int32,))
    check_shape("in_prompt", in_prompt, tuple(output_counts.shape))
    check_dtype("in_prompt", in_prompt, (torch.uint8,))
    for name, tensor in (("logits", logits), ("out", out), ("output_counts", output_counts), ("in_prompt", in_prompt),
                         ("bias_ids", params.bias_ids), ("bias_values", params.bias_values)):  # fmt: skip
        check_last_contiguous(name, tensor)
    check_shape("bias_values", params.bias_values, tuple(params.bias_ids.shape))
    if num_rows == 0:
        return
    _adjust_logits_kernel[(triton.cdiv(vocab_size, _TILE), num_rows)](
        logits, out, params.slot, output_counts, in_prompt, params.repetition_penalty, params.frequency_penalty,
        params.presence_penalty, params.num_biases, params.bias_ids, params.bias_values, vocab_size,
        logits.stride(0), out.stride(0), output_counts.stride(0), in_prompt.stride(0), params.bias_ids.stride(0),
        TILE=_TILE, num_warps=4,
    )  # fmt: skip


@triton.jit
def _count_tokens_kernel(
    token_ids,  # [R] int64
    slots,  # [R] int32; -1: not counted
    output_counts,  # [slots, vocab_size] int32, updated in place
    num_rows,
    stride_counts,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slot = tl.load(slots + rows, mask=rows < num_rows, other=-1).to(tl.int64)
    token = tl.load(token_ids + rows, mask=rows < num_rows, other=0)
    # Two rows may share a slot only if they are one sequence's: atomics keep that right.
    tl.atomic_add(output_counts + slot * stride_counts + token, 1, mask=slot >= 0)


def count_tokens(token_ids: Tensor, slots: Tensor, output_counts: Tensor) -> None:
    """Add 1 to output_counts [slots, vocab] int32 at (slots[i], token_ids[i]); a slot of -1 is not counted."""
    num_rows = token_ids.shape[0]
    check_dtype("token_ids", token_ids, (torch.int64,))
    check_shape("slots", slots, (num_rows,))
    check_dtype("output_counts", output_counts, (torch.int32,))
    if num_rows:
        _count_tokens_kernel[(triton.cdiv(num_rows, 128),)](
            token_ids, slots, output_counts, num_rows, output_counts.stride(0), TILE=128, num_warps=4
        )
