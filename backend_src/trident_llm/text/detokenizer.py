"""Token ids to text, piece by piece: what was emitted is never taken back, and is never half a character.

The concatenation of all pieces equals the tokenizer's own decoding of the whole sequence, special tokens skipped.
Each token costs the same, however long the text is. Two kinds of decoder exist among the supported models: byte-level
(GPT-2's alphabet) and sentencepiece (pieces with a space marker, bytes as fallback).
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import LoadFailed

_FALLBACK_BYTE = re.compile(r"<0x([0-9a-fA-F]{2})>")
_REPLACEMENT = "\ufffd"


class Detokenizer(ABC):
    """The text of one token sequence. Call ``push`` with each id in order, then ``finish`` once."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; often empty. Unknown ids have no text."""

    @abstractmethod
    def finish(self) -> str:
        """The text of what is left; an incomplete character becomes U+FFFD."""


Pieces = Callable[[int], str | None]
"""Token id -> its string in the vocabulary; None for special tokens and for unknown ids, which have no text."""


class ByteLevelDetokenizer(Detokenizer):
    """Every token is a run of bytes; the bytes together are UTF-8."""

    def __init__(self, pieces: Pieces, cache: dict[int, bytes]) -> None:
        self._pieces = pieces
        self._cache = cache
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        data = self._cache.get(token_id)
        if data is None:
            data = self._cache[token_id] = piece_bytes(self._pieces(token_id) or "")
        return self._utf8.decode(data)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class SentencePieceDetokenizer(Detokenizer):
    """Tokens are strings, or single bytes ``<0xE2>``.

    A run of byte tokens is one text if all of it is UTF-8, otherwise each byte is U+FFFD: so its text is certain
    only when the run ends.
    """

    def __init__(self, pieces: Pieces, spec: SentencePieceSpec, *, at_start: bool) -> None:
        self._pieces = pieces
        self._spec = spec
        self._run = bytearray()
        self._num_strip = spec.num_strip if at_start else 0
        self._is_first = at_start

    def push(self, token_id: int) -> str:
        piece = self._pieces(token_id)
        if piece is None:
            return ""
        text = self._spec.text(piece, is_first=self._is_first)
        self._is_first = False
        byte = _FALLBACK_BYTE.fullmatch(text) if self._spec.byte_fallback else None
        if byte:
            self._run.append(int(byte[1], 16))
            return ""
        return self._stripped(self._end_run() + text)

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        """``text`` without the spaces that are still to be taken off the start of the whole."""
        while self._num_strip and text:
            if not text.startswith(self._spec.strip):
                self._num_strip = 0
                break
            text = text[1:]
            self._num_strip -= 1
        return text


@dataclass(frozen=True, slots=True)
class SentencePieceSpec:
    """What a sentencepiece decoder does: replace in each piece, join byte tokens, strip the start of the whole."""

    replacements: tuple[tuple[str, str], ...]
    byte_fallback: bool = False
    strip: str = " "
    num_strip: int = 0
    drop_in_first: str = ""
    """Removed from the first piece instead of being replaced (Metaspace)."""

    def text(self, piece: str, *, is_first: bool) -> str:
        if is_first and self.drop_in_first:
            piece = piece.replace(self.drop_in_first, "")
        for old, new in self.replacements:
            piece = piece.replace(old, new)
        return piece


def read_decoder(decoder: dict[str, Any] | None) -> SentencePieceSpec | None:
    """What the ``decoder`` of a tokenizer.json asks for; None means byte-level. Raises ``LoadFailed`` for others."""
    steps: list[dict[str, Any]] = [decoder or {"type": "none"}]
    if steps[0]["type"] == "Sequence":
        steps = steps[0]["decoders"]
    kinds = [step["type"] for step in steps]
    # Transformers 5.17 makes the second of a GGUF file's BPE. Its first three steps find nothing to do: a piece made of
    # the bytes' characters is no <0xNN> and holds no U+2581.
    if kinds in (["ByteLevel"], ["ByteFallback", "Fuse", "Replace", "ByteLevel"]):
        return None
    if kinds == ["Metaspace"]:
        marker, scheme = steps[0]["replacement"], steps[0].get("prepend_scheme", "always")
        return SentencePieceSpec(((marker, " "),), drop_in_first="" if scheme == "never" else marker)
    num_replace = next((i for i, kind in enumerate(kinds) if kind != "Replace"), len(kinds))
    patterns = [step["pattern"].get("String") for step in steps[:num_replace]]
    rest = kinds[num_replace:]
    strip = steps[-1] if rest[-2:] == ["Fuse", "Strip"] else None
    joined = rest in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"], ["Fuse"], ["Fuse", "Strip"])
    if not joined or None in patterns or (strip is not None and strip["stop"] != 0):
        raise LoadFailed(
            f"decoder {' + '.join(kinds)} is not supported; supported are ByteLevel, Metaspace, and "
            "Replace + ByteFallback + Fuse + Strip of the start"
        )
    return SentencePieceSpec(
        replacements=tuple((old, step["content"]) for old, step in zip(patterns, steps, strict=False)),
        byte_fallback=rest[0] == "ByteFallback",
        strip=strip["content"] if strip else " ",
        num_strip=strip["start"] if strip else 0,
    )


def piece_bytes(piece: str) -> bytes:
    """The bytes of a byte-level piece. One with a character outside the alphabet stands for itself."""
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in piece)
    except KeyError:
        return piece.encode("utf-8")


def byte_alphabet() -> Sequence[str]:
    """The character that stands for each byte in GPT-2's vocabulary: printable ones for themselves, the others for
    the code points from 256 on, in order (Radford et al., 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [chars[byte] for byte in range(256)]


_BYTE_OF_CHAR = {char: byte for byte, char in enumerate(byte_alphabet())}
