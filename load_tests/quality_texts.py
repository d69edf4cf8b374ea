"""The texts that quality is measured on, as sequences of token ids. data/README.md says where they come from."""

from __future__ import annotations

from pathlib import Path

from trident_llm.text import Tokenizer

DATA = Path(__file__).parent / "data"
KINDS = ("prose", "code")


def read_text(kind: str) -> str:
    return (DATA / f"{kind}.txt").read_text(encoding="utf-8")


def num_sequences(num_tokens: int, length: int) -> int | None:
    """Sequences of ``length`` tokens that about ``num_tokens`` make, at least one; None, which is all, for 0."""
    return max(num_tokens // length, 1) if num_tokens else None


def text_sequences(tokenizer: Tokenizer, kind: str, length: int, most: int | None = None) -> list[list[int]]:
    """The text cut into whole sequences of ``length`` tokens, ``most`` of them, evenly spread; None: all.

    Each begins as the tokenizer begins a text (beginning of sequence, if it has one). Raises ValueError when the text
    is shorter than one.
    """
    beginning = tokenizer.encode("")
    tokens = tokenizer.encode(read_text(kind), add_special_tokens=False)
    step = length - len(beginning)
    available = len(tokens) // step
    if not available:
        raise ValueError(f"{kind}: {len(tokens)} tokens; a sequence has {length}")
    count = available if most is None else min(most, available)
    starts = [index * available // count * step for index in range(count)]
    return [beginning + tokens[start : start + step] for start in starts]
