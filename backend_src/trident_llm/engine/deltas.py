"""What a door is told of a sequence: a token that became known, or the error that ended it."""

from __future__ import annotations

from ..errors import TridentError
from ..protocol import Delta, FinishReason
from .model_runner import SampledToken
from .sequence import Sequence


def token_delta(token: SampledToken, finish_reason: FinishReason | None, *, stopped: bool) -> Delta:
    """For a token that its sequence has at its end. ``stopped``: whether the token itself ended it."""
    seq = token.seq
    is_first = seq.num_output_tokens == 1
    return Delta(
        request_id=seq.request_id,
        sample_index=seq.sample_index,
        offset=seq.num_output_tokens - 1,
        token_ids=[token.token_id],
        logprobs=None if token.logprobs is None else [token.logprobs],
        finish_reason=finish_reason,
        stopped_by_token=stopped,
        num_cached_tokens=seq.num_cached_tokens,
        adapter=seq.blend.spec if seq.blend and is_first else "",
        started_at=seq.started_at if is_first else 0.0,
        scalings=_named(seq, token.scalings),
    )


def error_delta(seq: Sequence, error: TridentError) -> Delta:
    """For a sequence that the scheduler has let go of."""
    return Delta(
        request_id=seq.request_id,
        sample_index=seq.sample_index,
        offset=seq.num_output_tokens,
        token_ids=[],
        finish_reason="error",
        error=str(error),
    )


def _named(seq: Sequence, scalings: list[list[float]] | None) -> dict[str, list[float]] | None:
    """By adapter."""
    if scalings is None:
        return None
    columns = zip(*scalings, strict=True)
    return {adapter.name: list(column) for adapter, column in zip(seq.adapters, columns, strict=True)}
