"""Draws one token per row on the GPU: greedy, or temperature, min-p, top-k and top-p, without a sort.

The order and meaning of the steps are those of ``sampling.sampler``. Top-k and top-p keep a row's largest values down
to a threshold, which is found by bisection on values; the draw is an inverse CDF in vocabulary order. Among equal
values at the threshold those with the lowest ids are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sampling.sampler import GREEDY_TEMPERATURE
from .checks import FLOAT_DTYPES, check_dtype, check_last_contiguous, check_shape

_CANDIDATES = 4096
"""Once so few values are left between the bounds, they are copied out and the row is not read again."""
_TILE = 8192


@dataclass(frozen=True)
class SamplingTensors:
    """Parameters of R rows, on the device."""

    temperature: Tensor
    """[R] float32; below 1e-5: greedy."""
    top_k: Tensor
    """[R] int32; 0 or at least the vocabulary: all."""
    top_p: Tensor
    """[R] float32 in (0, 1]."""
    min_p: Tensor
    """[R] float32 in [0, 1]."""
    seed: Tensor
    """[R] int64: the bits of an unsigned seed."""
    sample_index: Tensor
    """[R] int64."""
    position: Tensor
    """[R] int64: the drawn token's index in the sequence, prompt included."""


@triton.jit
def _probe(values, n, divisor, floor, top, pivot, TILE: tl.constexpr):
    """Of the values >= floor: how many exceed pivot, their mass, the least of them, and the greatest of the others."""
    offsets = tl.arange(0, TILE)
    count = tl.zeros([TILE], tl.int32)
    mass = tl.zeros([TILE], tl.float32)
    least = tl.full([TILE], float("inf"), tl.float32)
    greatest = tl.full([TILE], float("-inf"), tl.float32)
    for first in range(0, n, TILE):
        x = tl.load(values + first + offsets, mask=first + offsets < n, other=float("-inf")).to(tl.float32) / divisor
        valid = (x >= floor) & (x > float("-inf"))
        above = valid & (x > pivot)
        count += above.to(tl.int32)
        mass += tl.where(above, tl.exp(x - top), 0.0)
        least = tl.minimum(least, tl.where(above, x, float("inf")))
        greatest = tl.maximum(greatest, tl.where(valid & (x <= pivot), x, float("-inf")))
    return tl.sum(count, 0), tl.sum(mass.to(tl.float64), 0), tl.min(least, 0), tl.max(greatest, 0)


@triton.jit
def _bisect(
    values, n, divisor, floor, top, low, next_low, high, count_low, count_high, mass_high,
    base_count, base_mass, max_count, max_mass, stop_at, TILE: tl.constexpr,
):  # fmt: skip
    """Narrow (low, high] until it holds one distinct value, or at most stop_at values.

    Wanted is the least value v with count(> v) < max_count and mass(> v) < max_mass. That holds for high, itself a
    value, and not for low. next_low is the least value above low, count_* and mass_high are of the values above the
    bound, base_* of those above every one of ``values``.
    """
    while (next_low < high) & (count_low - count_high > stop_at):
        pivot = low + (high - low) * 0.5
        pivot = tl.where((pivot >= high) | (pivot <= low), next_low, pivot)
        count, mass, least, greatest = _probe(values, n, divisor, floor, top, pivot, TILE)
        count += base_count
        mass += base_mass
        fits = (count < max_count) & (mass < max_mass)
        high = tl.where(fits, greatest, high)
        count_high = tl.where(fits, count, count_high)
        mass_high = tl.where(fits, mass, mass_high)
        low = tl.where(fits, low, pivot)
        next_low = tl.where(fits, next_low, least)
        count_low = tl.where(fits, count_low, count)
    return low, next_low, high, count_low, count_high, mass_high


@triton.jit
def _find_threshold(
    row, vocab_size, temperature, floor, top, low, next_low, count_low, max_count, max_mass, candidates,
    TILE: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The wanted value of ``_bisect`` over a row; arguments and results as there."""
    count_high = tl.zeros((), tl.int32)
    mass_high = tl.zeros((), tl.float64)
    low, next_low, high, count_low, count_high, mass_high = _bisect(
        row, vocab_size, temperature, floor, top, low, next_low, top, count_low, count_high, mass_high,
        0, 0.0, max_count, max_mass, CANDIDATES, TILE,
    )  # fmt: skip
    if next_low < high:
        offsets = tl.arange(0, TILE)
        found = tl.zeros((), tl.int32)
        # Another thread may still read what an earlier search left here.
        tl.debug_barrier()
        for first in range(0, vocab_size, TILE):
            inside = first + offsets < vocab_size
            x = tl.load(row + first + offsets, mask=inside, other=float("-inf")).to(tl.float32) / temperature
            between = (x >= floor) & (x > low) & (x <= high)
            tl.store(candidates + found + tl.cumsum(between.to(tl.int32), 0) - 1, x, mask=between)
            found += tl.sum(between.to(tl.int32), 0)
        tl.debug_barrier()
        low, next_low, high, count_low, count_high, mass_high = _bisect(
            candidates, found, 1.0, float("-inf"), top, low, next_low, high, count_low, count_high, mass_high,
            count_high, mass_high, max_count, max_mass, 0, CANDIDATES,
        )  # fmt: skip
    return low, high, count_low, count_high, mass_high


@triton.jit
def _inverse_cdf(row, vocab_size, temperature, top, number, threshold, quota, TILE: tl.constexpr):
    """The first id whose cumulative mass exceeds number times the total; -1 if there is none.

    Kept are the values above threshold and the first ``quota`` of those equal to it. Sums are in float64.
    """
    offsets = tl.arange(0, TILE)
    threshold_mass = tl.exp(threshold - top).to(tl.float64)
    total = tl.zeros((), tl.float64)
    ties = tl.zeros((), tl.int64)
    for first in range(0, vocab_size, TILE):
        x = tl.load(row + first + offsets, mask=first + offsets < vocab_size, other=float("-inf")).to(tl.float32)
        x = x / temperature
        total += tl.sum(tl.where(x > threshold, tl.exp(x - top), 0.0).to(tl.float64), 0)
        equal = tl.sum((x == threshold).to(tl.int64), 0)
        total += threshold_mass * tl.minimum(tl.maximum(quota - ties, 0), equal).to(tl.float64)
        ties += equal

    # The same sums in the same order reach the same total, so a number below 1 always stops in a tile.
    target = number * total
    before = tl.zeros((), tl.float64)
    ties = tl.zeros((), tl.int64)
    first = tl.zeros((), tl.int32)
    searching = total > 0
    while searching:
        x = tl.load(row + first + offsets, mask=first + offsets < vocab_size, other=float("-inf")).to(tl.float32)
        x = x / temperature
        equal = tl.sum((x == threshold).to(tl.int64), 0)
        after = before + tl.sum(tl.where(x > threshold, tl.exp(x - top), 0.0).to(tl.float64), 0)
        after += threshold_mass * tl.minimum(tl.maximum(quota - ties, 0), equal).to(tl.float64)
        searching = (after <= target) & (first + TILE < vocab_size)
        before = tl.where(searching, after, before)
        ties = tl.where(searching, ties + equal, ties)
        first = tl.where(searching, first + TILE, first)

    x = tl.load(row + first + offsets, mask=first + offsets < vocab_size, other=float("-inf")).to(tl.float32)
    x = x / temperature
    equal = (x == threshold).to(tl.int64)
    kept = (x > threshold) | ((x == threshold) & (ties + tl.cumsum(equal, 0) - equal < quota))
    mass = tl.where(kept, tl.exp(x - top), 0.0).to(tl.float64)
    kept = kept & (mass > 0)
    cumulative = before + tl.cumsum(mass, 0)
    hit = tl.min(tl.where(kept & (cumulative > target), offsets, TILE), 0)
    last = tl.max(tl.where(kept, offsets, -1), 0)
    chosen = tl.where(hit < TILE, hit, last)
    return tl.where((total > 0) & (chosen >= 0), first + chosen, -1)


@triton.jit
def _sample_tokens_kernel(
    logits,  # [R, vocab_size]
    temperatures,  # [R] float32
    top_ks,  # [R] int32
    top_ps,  # [R] float32
    min_ps,  # [R] float32
    seeds,  # [R] int64
    sample_indices,  # [R] int64
    positions,  # [R] int64
    candidates,  # [R, CANDIDATES] float32, workspace
    token_ids,  # [R] int64, written
    vocab_size,
    stride_logits,
    TILE: tl.constexpr,
    CANDIDATES: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
    GREEDY: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride_logits
    offsets = tl.arange(0, TILE)
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_id = offsets
    for first in range(0, vocab_size, TILE):
        x = tl.load(row + first + offsets, mask=first + offsets < vocab_size, other=float("-inf")).to(tl.float32)
        better = x > best
        best = tl.where(better, x, best)
        best_id = tl.where(better, first + offsets, best_id)
    largest = tl.max(best, 0)
    token = tl.min(tl.where(best == largest, best_id, vocab_size - 1), 0)
    if not GREEDY:
        temperature = tl.load(temperatures + index)
        if temperature >= MIN_TEMPERATURE:
            top = largest / temperature
            floor = top + tl.log(tl.load(min_ps + index))
            top_k = tl.load(top_ks + index)
            top_p = tl.load(top_ps + index)
            # Until something cuts the row, every value from the floor on is kept.
            threshold = floor
            quota = tl.zeros((), tl.int64) + vocab_size
            cut_k = (top_k > 0) & (top_k < vocab_size)
            if cut_k | (top_p < 1.0):
                count, mass, least, _ = _probe(row, vocab_size, temperature, floor, top, float("-inf"), TILE)
                low = least - 1.0 - tl.abs(least) * 1e-5
                if cut_k & (top_k < count):
                    low, threshold, count, above, mass_above = _find_threshold(
                        row, vocab_size, temperature, floor, top, low, least, count, top_k, float("inf"),
                        candidates + index * CANDIDATES, TILE, CANDIDATES,
                    )  # fmt: skip
                    least = threshold
                    quota = (top_k - above).to(tl.int64)
                    mass = mass_above + quota.to(tl.float64) * tl.exp(threshold - top).to(tl.float64)
                if top_p < 1.0:
                    max_mass = top_p.to(tl.float64) * mass
                    low, bound, count, above, mass_above = _find_threshold(
                        row, vocab_size, temperature, least, top, low, least, count, vocab_size + 1, max_mass,
                        candidates + index * CANDIDATES, TILE, CANDIDATES,
                    )  # fmt: skip
                    # Of equal values a further one stays while the mass before it is below top_p.
                    room = tl.ceil((max_mass - mass_above) / tl.exp(bound - top).to(tl.float64))
                    room = tl.maximum(room, 1.0)
                    room = tl.minimum(room, vocab_size).to(tl.int64)
                    quota = tl.where(bound == threshold, tl.minimum(quota, room), room)
                    threshold = bound
            random, _, _, _ = tl.philox(
                tl.load(seeds + index),
                tl.load(positions + index).to(tl.uint32),
                tl.load(sample_indices + index).to(tl.uint32),
                tl.zeros((), tl.uint32),
                tl.zeros((), tl.uint32),
            )
            number = random.to(tl.float64) * 2.3283064365386963e-10
            drawn = _inverse_cdf(row, vocab_size, temperature, top, number, threshold, quota, TILE)
            token = tl.where(drawn >= 0, drawn, token)
    tl.store(token_ids + index, token.to(tl.int64))


def allocate_workspace(num_rows: int, device: torch.device) -> Tensor:
    """What ``sample_tokens`` needs for so many rows."""
    return torch.empty(num_rows, _CANDIDATES, dtype=torch.float32, device=device)


def sample_tokens(
    logits: Tensor, params: SamplingTensors, token_ids: Tensor, workspace: Tensor, *, greedy: bool = False
) -> None:
    """Draw a token for each row of logits [R, vocab] into token_ids [R] int64.

    The random number of a row is word 0 of Philox 4x32-10 on (position, sample_index, 0, 0) under its seed, as in
    ``sampling.philox``. greedy: all rows take their largest logit, whatever ``params`` say. workspace: from
    ``allocate_workspace`` for at least R rows.
    """
    num_rows, vocab_size = logits.shape
    check_dtype("logits", logits, FLOAT_DTYPES)
    check_last_contiguous("logits", logits)
    check_shape("token_ids", token_ids, (num_rows,))
    check_dtype("token_ids", token_ids, (torch.int64,))
    for name, dtype in (("temperature", torch.float32), ("top_k", torch.int32), ("top_p", torch.float32),
                        ("min_p", torch.float32), ("seed", torch.int64), ("sample_index", torch.int64),
                        ("position", torch.int64)):  # fmt: skip
        check_shape(name, getattr(params, name), (num_rows,))
        check_dtype(name, getattr(params, name), (dtype,))
    if num_rows == 0:
        return
    if workspace.shape[0] < num_rows:
        raise ValueError(f"workspace has {workspace.shape[0]} rows; {num_rows} are needed")
    _sample_tokens_kernel[(num_rows,)](
        logits, params.temperature, params.top_k, params.top_p, params.min_p, params.seed, params.sample_index,
        params.position, workspace, token_ids, vocab_size, logits.stride(0),
        TILE=_TILE, CANDIDATES=_CANDIDATES, MIN_TEMPERATURE=GREEDY_TEMPERATURE, GREEDY=greedy, num_warps=16,
    )  # fmt: skip
