"""Log-probabilities of chosen tokens, their ranks, and the most likely tokens, on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape

_TILE = 8192


@dataclass(frozen=True)
class LogprobTensors:
    """Of R rows, on the device."""

    chosen: Tensor
    """[R] float32: the chosen tokens' log-probabilities."""
    rank: Tensor
    """[R] int32: 1 for the most likely token."""
    top_ids: Tensor
    """[R, N] int64, most likely first."""
    top: Tensor
    """[R, N] float32."""


@triton.jit
def _token_logprobs_kernel(
    logits,  # [R, vocab_size]
    token_ids,  # [R] int64
    log_sums,  # [R] float32, written: log of the sum of exponentials
    logprobs,  # [R] float32, written
    ranks,  # [R] int32, written
    vocab_size,
    stride_logits,
    TILE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride_logits
    chosen = tl.load(row + tl.load(token_ids + index)).to(tl.float32)
    offsets = tl.arange(0, TILE)
    # Finite from the start: a lane that sees only -inf then gives 0, not NaN.
    largest = tl.full([TILE], -1e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    greater = tl.zeros([TILE], tl.int32)
    for first in range(0, vocab_size, TILE):
        x = tl.load(row + first + offsets, mask=first + offsets < vocab_size, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, x)
        total = total * tl.exp(largest - new_largest) + tl.exp(x - new_largest)
        largest = new_largest
        greater += (x > chosen).to(tl.int32)
    top = tl.max(largest, 0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    tl.store(log_sums + index, log_sum)
    tl.store(logprobs + index, chosen - log_sum)
    tl.store(ranks + index, tl.sum(greater, 0) + 1)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> LogprobTensors:
    """Log-probabilities under logits [R, vocab] of token_ids [R] int64 and of each row's num_top most likely tokens."""
    num_rows, vocab_size = logits.shape
    check_dtype("logits", logits, FLOAT_DTYPES)
    check_last_contiguous("logits", logits)
    check_shape("token_ids", token_ids, (num_rows,))
    check_dtype("token_ids", token_ids, (torch.int64,))
    log_sums, chosen = torch.empty(2, num_rows, dtype=torch.float32, device=logits.device)
    rank = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows:
        _token_logprobs_kernel[(num_rows,)](
            logits, token_ids, log_sums, chosen, rank, vocab_size, logits.stride(0), TILE=_TILE, num_warps=16
        )
    values, top_ids = torch.topk(logits, min(num_top, vocab_size), dim=-1)
    return LogprobTensors(chosen, rank, top_ids, values.float() - log_sums[:, None])
