"""What a generation returns: chunks while it streams, a completion when it is whole. Knows nothing of gRPC."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """New text of one sample.

    ``text`` may be empty: in the last chunk, and while the server holds text back that could become a stop string.
    ``num_output_tokens`` counts the tokens new in this chunk. What was not asked for, or is not known yet, is None.
    """

    text: str
    index: int = 0
    """Which of the ``n`` samples."""
    finish_reason: FinishReason | None = None
    """Set in the last chunk of a sample."""
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None
    """Input tokens that came from the prefix cache (option ``return_num_cached_tokens``)."""
    scalings: dict[str, float] | None = None
    """Mean scaling so far of each adapter of an X-LoRA mix (option ``return_scalings``)."""
    layer_scalings: list[dict[str, list[float]]] | None = None
    """One entry per new token: scalings of each adapter by layer (option ``return_layer_scalings``)."""
    cumulative_logprob: float | None = None
    """Sum of the log-probabilities of the sample's tokens so far (option ``logprobs``)."""
    logprobs: list[Any] | None = None
    """One entry per new token, as the server's JSON has it (option ``logprobs``)."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One whole answer. Fields as in ``Chunk``; ``num_output_tokens`` counts all of the sample's tokens."""

    text: str
    finish_reason: FinishReason | None
    num_output_tokens: int | None
    cumulative_logprob: float | None
    logprobs: list[Any] | None
    scalings: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The ``n`` whole answers to one prompt. The properties speak of the first, which mostly is the only one."""

    samples: tuple[Sample, ...]
    num_input_tokens: int | None
    num_cached_tokens: int | None

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.samples[0].finish_reason

    @property
    def num_output_tokens(self) -> int | None:
        return self.samples[0].num_output_tokens

    @classmethod
    def from_chunks(cls, chunks: Iterable[Chunk]) -> Completion:
        """Put chunks of any number of samples together; without any, the one sample is empty."""
        by_index: dict[int, list[Chunk]] = {}
        num_input_tokens = num_cached_tokens = None
        for chunk in chunks:
            by_index.setdefault(chunk.index, []).append(chunk)
            num_input_tokens = _latest(num_input_tokens, chunk.num_input_tokens)
            num_cached_tokens = _latest(num_cached_tokens, chunk.num_cached_tokens)
        return cls(
            samples=tuple(_join(by_index[index]) for index in sorted(by_index)) or (_join([]),),
            num_input_tokens=num_input_tokens,
            num_cached_tokens=num_cached_tokens,
        )


def _join(chunks: list[Chunk]) -> Sample:
    reason, cumulative, scalings = None, None, None
    for chunk in chunks:
        reason = _latest(reason, chunk.finish_reason)
        cumulative = _latest(cumulative, chunk.cumulative_logprob)
        scalings = _latest(scalings, chunk.scalings)
    counts = [chunk.num_output_tokens for chunk in chunks if chunk.num_output_tokens is not None]
    logprobs = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    return Sample(
        text="".join(chunk.text for chunk in chunks),
        finish_reason=reason,
        num_output_tokens=sum(counts) if counts else None,
        cumulative_logprob=cumulative,
        logprobs=[entry for part in logprobs for entry in part] if logprobs else None,
        scalings=scalings,
    )


def _latest(known: Any, new: Any) -> Any:
    return known if new is None else new
