"""Log-probabilities of the server's JSON in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Mapping[str, Any]]
"""One position: token id -> logprob, rank (1 is the most likely) and decoded_token; the chosen token comes first."""


def chat_logprobs(rows: Sequence[Row], top: int) -> dict[str, Any]:
    """``logprobs`` of a choice of a chat completion, with ``top`` most likely tokens at each position."""
    content = []
    for row in rows:
        chosen = next(iter(row.values()))
        content.append({**_entry(chosen), "top_logprobs": [_entry(token) for token in _most_likely(row, top)]})
    return {"content": content, "refusal": None}


def completion_logprobs(rows: Sequence[Row], top: int, offset: int) -> dict[str, Any]:
    """``logprobs`` of a choice of a completion; ``offset``: characters of its tokens before the first row."""
    tokens = [next(iter(row.values())) for row in rows]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token["decoded_token"])
    likely = [{token["decoded_token"]: token["logprob"] for token in _most_likely(row, top)} for row in rows]
    return {
        "tokens": [token["decoded_token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": likely if top else None,
        "text_offset": offsets,
    }


def num_chars(rows: Sequence[Row]) -> int:
    """Characters of the chosen tokens."""
    return sum(len(next(iter(row.values()))["decoded_token"]) for row in rows)


def _most_likely(row: Row, top: int) -> list[Mapping[str, Any]]:
    return sorted(row.values(), key=lambda token: token["rank"])[:top]


def _entry(token: Mapping[str, Any]) -> dict[str, Any]:
    text = token["decoded_token"]
    # A token that is part of a character has no text of its own, so its bytes are not known here.
    data = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": token["logprob"], "bytes": data}
