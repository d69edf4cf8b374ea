"""Sampler: logits and sampling parameters in, one token per row out. Torch twin; runs on any device.

Order, as in vLLM: min_tokens mask, logit bias, penalties, temperature, min-p, top-k, top-p. Log-probabilities are
those of the untouched logits.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from ..protocol import SamplingParams, TokenLogprobs, TopLogprob
from .philox import uniform

GREEDY_TEMPERATURE = 1e-5
"""Below this the largest logit is taken: dividing by less overflows float32."""
_CANDIDATES = 1024
"""Top-p looks at this many tokens first; only when they hold too little mass is the whole vocabulary sorted."""


@dataclass(frozen=True)
class SamplingRow:
    """One token to draw. ``position`` is its index in the sequence, prompt included."""

    params: SamplingParams
    sample_index: int
    position: int
    token_ids: Seq[int]
    """The tokens before it: prompt, then output."""
    num_prompt_tokens: int
    stop_ids: frozenset[int]

    @property
    def forbids_stop(self) -> bool:
        return self.position - self.num_prompt_tokens < self.params.min_tokens


@dataclass(frozen=True)
class SampledTokens:
    """``logprobs`` has an entry per row, None where the row did not ask."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


def sample(logits: Tensor, rows: Seq[SamplingRow]) -> SampledTokens:
    """Draw one token for each row of ``logits`` [R, vocab] float32."""
    wants_logprobs = [row.params.logprobs is not None for row in rows]
    raw = torch.log_softmax(logits, dim=-1) if any(wants_logprobs) else None
    changed = [i for i, row in enumerate(rows) if _changes_logits(row)]
    if changed:
        logits = logits.clone()
        for i in changed:
            _change_logits(logits[i], rows[i])
    token_ids = torch.argmax(logits, dim=-1).tolist()
    random = [i for i, row in enumerate(rows) if row.params.temperature >= GREEDY_TEMPERATURE]
    if random:
        drawn = _draw(logits[random], [rows[i] for i in random])
        for i, token_id in zip(random, drawn, strict=True):
            token_ids[i] = token_id
    logprobs: list[TokenLogprobs | None] = [None] * len(rows)
    if raw is not None:
        for i, row in enumerate(rows):
            if row.params.logprobs is not None:
                logprobs[i] = _token_logprobs(raw[i], token_ids[i], row.params.logprobs)
    return SampledTokens(token_ids, logprobs)


def _changes_logits(row: SamplingRow) -> bool:
    params = row.params
    return bool(params.logit_bias) or params.has_penalties or row.forbids_stop


def _change_logits(logits: Tensor, row: SamplingRow) -> None:
    """Apply mask, bias and penalties to one row [vocab] in place."""
    params = row.params
    if row.forbids_stop and row.stop_ids:
        logits[torch.tensor(sorted(row.stop_ids), device=logits.device)] = float("-inf")
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if not params.has_penalties:
        return
    vocab_size = logits.shape[-1]
    tokens = torch.tensor(row.token_ids, dtype=torch.int64, device=logits.device)
    counts = torch.bincount(tokens[row.num_prompt_tokens :], minlength=vocab_size)
    if params.repetition_penalty != 1:
        seen = torch.zeros(vocab_size, dtype=torch.bool, device=logits.device)
        seen[tokens] = True
        factor = params.repetition_penalty
        logits.copy_(torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits))
    logits -= params.frequency_penalty * counts
    logits -= params.presence_penalty * (counts > 0)


def _draw(logits: Tensor, rows: Seq[SamplingRow]) -> list[int]:
    """Inverse-CDF sampling of ``logits`` [R, vocab] with one random number a row."""
    device = logits.device
    params = [row.params for row in rows]
    drawn = uniform([p.seed for p in params], [row.sample_index for row in rows], [row.position for row in rows])
    numbers = torch.from_numpy(drawn).to(device)
    temperature = torch.tensor([p.temperature for p in params], device=device)
    logits = logits / temperature[:, None]
    if any(p.min_p > 0 for p in params):
        threshold = torch.tensor([p.min_p for p in params], device=device).log()
        floor = logits.max(dim=-1, keepdim=True).values + threshold[:, None]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    token_ids = [0] * len(rows)
    vocab_size = logits.shape[-1]
    truncated = [i for i, p in enumerate(params) if p.top_p < 1 or 0 < p.top_k < vocab_size]
    whole = [i for i in range(len(rows)) if i not in set(truncated)]
    if whole:
        chosen = _inverse_cdf(torch.softmax(logits[whole].double(), dim=-1), numbers[whole])
        for i, token_id in zip(whole, chosen.tolist(), strict=True):
            token_ids[i] = token_id
    for i in truncated:
        token_ids[i] = _draw_truncated(logits[i], params[i], numbers[i : i + 1])
    return token_ids


def _draw_truncated(logits: Tensor, params: SamplingParams, number: Tensor) -> int:
    """Draw from the top-k, top-p part of one row [vocab]."""
    vocab_size = logits.shape[-1]
    top_k = params.top_k if 0 < params.top_k < vocab_size else vocab_size
    num_candidates = min(top_k, max(_CANDIDATES, params.top_k))
    total = torch.logsumexp(logits.double(), dim=-1)
    while True:
        values, ids = torch.topk(logits, num_candidates)
        values = values.double()
        normaliser = total if num_candidates < top_k or top_k == vocab_size else torch.logsumexp(values, dim=-1)
        probs = torch.exp(values - normaliser)
        # A token stays when the mass before it is below top_p, so the most likely one always does.
        before = torch.cumsum(probs, dim=-1) - probs
        if num_candidates == top_k or bool(before[-1] >= params.top_p):
            break
        num_candidates = top_k
    probs = probs.masked_fill(before >= params.top_p, 0.0)
    return int(ids[_inverse_cdf((probs / probs.sum())[None], number)[0]])


def _inverse_cdf(probs: Tensor, numbers: Tensor) -> Tensor:
    """[R] indices: the first whose cumulative probability exceeds the number [R]. ``probs`` [R, N] float64."""
    cumulative = torch.cumsum(probs, dim=-1)
    # Rounding can leave the total below 1: scaling by it keeps every number inside, on a token with mass.
    targets = numbers.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)


def _token_logprobs(logprobs: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    chosen = logprobs[token_id]
    rank = int((logprobs > chosen).sum()) + 1
    top: list[TopLogprob] = []
    if num_top:
        values, ids = torch.topk(logprobs, min(num_top, logprobs.shape[-1]))
        top = [TopLogprob(i, v) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return TokenLogprobs(token_id, float(chosen), rank, top)
