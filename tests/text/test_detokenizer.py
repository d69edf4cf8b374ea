"""What the detokenizer emits adds up to the tokenizer's own decoding, and is never half a character."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from tests.text.conftest import SENTENCEPIECE_TOKENS, write_sentencepiece
from trident_llm.errors import LoadFailed
from trident_llm.text import Tokenizer
from trident_llm.text.detokenizer import byte_alphabet

BYTES = st.one_of(st.integers(0, 300), st.sampled_from(list("é🎉日\ud7ff\U0010ffff".encode())))
PIECES = st.lists(st.integers(0, len(SENTENCEPIECE_TOKENS) + 3), max_size=30)


def pieces_of(tokenizer: Tokenizer, token_ids: list[int], after: list[int] | None = None) -> list[str]:
    """The text emitted for each id, and at the end."""
    detokenizer = tokenizer.detokenizer(after=after or [])
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


@given(token_ids=st.lists(BYTES, max_size=40))
def test_bytes_add_up(byte_tokenizer: Tokenizer, token_ids: list[int]) -> None:
    assert "".join(pieces_of(byte_tokenizer, token_ids)) == byte_tokenizer.decode(token_ids)


@given(token_ids=st.lists(BYTES, max_size=40))
def test_bytes_after_steps_for_sentencepieces_add_up(fallback_byte_tokenizer: Tokenizer, token_ids: list[int]) -> None:
    """The decoder that transformers 5.17 writes for a GGUF file."""
    text = "".join(pieces_of(fallback_byte_tokenizer, token_ids))
    assert text == fallback_byte_tokenizer.decode(token_ids)


@given(token_ids=PIECES)
def test_sentencepieces_add_up(sentencepiece_tokenizer: Tokenizer, token_ids: list[int]) -> None:
    assert "".join(pieces_of(sentencepiece_tokenizer, token_ids)) == sentencepiece_tokenizer.decode(token_ids)


@given(prompt=st.lists(st.integers(259, 267), min_size=1), token_ids=PIECES)
def test_sentencepieces_go_on_with_a_prompt(
    sentencepiece_tokenizer: Tokenizer, prompt: list[int], token_ids: list[int]
) -> None:
    """The space between prompt and output belongs to the output."""
    text = "".join(pieces_of(sentencepiece_tokenizer, token_ids, after=prompt))
    assert sentencepiece_tokenizer.decode(prompt) + text == sentencepiece_tokenizer.decode(prompt + token_ids)


@given(data=st.data())
def test_smollm2_adds_up(smollm2_tokenizer: Tokenizer, data: st.DataObject) -> None:
    token_ids = data.draw(st.lists(st.integers(0, smollm2_tokenizer.num_tokens + 5), max_size=40))
    assert "".join(pieces_of(smollm2_tokenizer, token_ids)) == smollm2_tokenizer.decode(token_ids)


@given(text=st.text())
def test_valid_text_comes_in_whole_characters(byte_tokenizer: Tokenizer, text: str) -> None:
    """Each character appears with its last byte, and not before."""
    expected = [part for char in text for part in [""] * (len(char.encode()) - 1) + [char]]
    assert pieces_of(byte_tokenizer, list(text.encode())) == [*expected, ""]


def test_incomplete_end_becomes_replacement_character(byte_tokenizer: Tokenizer) -> None:
    assert pieces_of(byte_tokenizer, list("a🎉".encode()[:-1])) == ["a", "", "", "", "\ufffd"]


def test_byte_run_waits_for_its_end(tmp_path: Path) -> None:
    """A bad byte at the end of a run makes the whole run bad: nothing of it is certain before."""
    tokenizer = Tokenizer(write_sentencepiece(tmp_path, decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])))
    euro = [3 + byte for byte in "€".encode()]
    dot = SENTENCEPIECE_TOKENS.index(".")
    assert pieces_of(tokenizer, [*euro, dot]) == ["", "", "", "€.", ""]
    assert pieces_of(tokenizer, [*euro, 3 + 0xFF, dot]) == ["", "", "", "", "\ufffd" * 4 + ".", ""]


def test_special_tokens_have_no_text(byte_tokenizer: Tokenizer) -> None:
    assert pieces_of(byte_tokenizer, [97, 256, 98]) == ["a", "", "b", ""]


def test_alphabet_is_that_of_the_library() -> None:
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert set(alphabet) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Sequence([decoders.Replace(tokenizers.Regex("a+"), "b"), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
    ],
)
def test_unsupported_decoder_is_refused_by_name(tmp_path: Path, decoder: decoders.Decoder) -> None:
    with pytest.raises(LoadFailed, match=r"tokenizer.json: decoder .* is not supported"):
        Tokenizer(write_sentencepiece(tmp_path, decoder))


def test_missing_decoder_is_refused(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path, decoders.Fuse()) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": None}))
    with pytest.raises(LoadFailed, match="decoder none"):
        Tokenizer(tmp_path)
