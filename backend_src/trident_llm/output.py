"""What a sample has produced, as callers read it, and its JSON form."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .protocol import FinishReason

_LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token at one position; ``rank`` is 1 for the most likely token."""

    token_id: int
    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The chosen token of one position and the most likely ones, best first (``top`` may hold the chosen one)."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """What one sample produced since the last ``take`` (or in all, from ``full_output``)."""

    sample_index: int
    text: str
    token_ids: list[int]
    """Their count is vllm_backend's ``num_output_tokens`` of one response."""
    finish_reason: FinishReason | None
    cumulative_logprob: float | None
    """Of all tokens so far; None unless ``logprobs`` or ``return_cumulative_logprob`` was asked for."""
    logprobs: list[PositionLogprobs] | None
    """One per token of ``token_ids``; None unless the option ``logprobs`` is set."""
    num_input_tokens: int
    num_output_tokens: int
    """Tokens of this sample so far, this output's included."""
    num_cached_tokens: int
    """Prompt tokens that came from the prefix cache."""
    scalings: dict[str, float] | None = None
    """Of the adapters of an X-LoRA mix, averaged over modules and this sample's tokens so far; None unless the option
    ``return_scalings`` or ``return_layer_scalings`` is set and there is a mix."""
    layer_scalings: list[dict[str, list[float]]] | None = None
    """One per token of ``token_ids``: of each adapter, averaged over the modules of each layer; None likewise."""


def logprobs_json(positions: Sequence[PositionLogprobs] | None) -> str:
    """The ``logprobs`` tensor as vllm_backend writes it: a JSON list with one object per token, from token id to
    ``{"logprob", "rank", "decoded_token"}``, the chosen token first; ``null`` when logprobs were not asked for."""
    if positions is None:
        return "null"
    rows = []
    for position in positions:
        entries: dict[str, object] = {}
        for token in (position.chosen, *position.top):
            value = token.logprob if math.isfinite(token.logprob) else _LOWEST_LOGPROB
            entry = {"logprob": value, "rank": token.rank, "decoded_token": token.decoded_token}
            entries.setdefault(str(token.token_id), entry)
        rows.append(entries)
    return json.dumps(rows)
