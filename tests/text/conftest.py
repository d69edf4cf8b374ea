"""Tokenizers for the tests of the text side: bytes, sentencepiece in three forms, and SmolLM2's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from tests.fakes.byte_tokenizer import write_byte_tokenizer
from trident_llm.text import Tokenizer

SENTENCEPIECE_TOKENS = [
    "<s>", "</s>", "<unk>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁", "▁▁", "▁the", "▁cat", "at", "s", "▁s", "é", "日本", "a▁b", "<0xZZ>", ".",
]  # fmt: skip
DECODERS = {
    "llama": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "gemma": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "metaspace": decoders.Metaspace(replacement="▁", prepend_scheme="first"),
}


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Ids 0 to 255 are bytes, 256 is the special token <eos>."""
    return Tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="session")
def fallback_byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As ``byte_tokenizer``, with steps of sentencepiece decoders before the one that counts."""
    folder = write_byte_tokenizer(tmp_path_factory.mktemp("fallback_bytes"))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.ByteLevel()]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="session", params=sorted(DECODERS))
def sentencepiece_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Ids index ``SENTENCEPIECE_TOKENS``; the first three are special."""
    return Tokenizer(write_sentencepiece(tmp_path_factory.mktemp(request.param), DECODERS[request.param]))


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: Path) -> Tokenizer:
    return Tokenizer(smollm2_folder)


def write_sentencepiece(folder: Path, decoder: decoders.Decoder) -> Path:
    """A tokenizer.json over ``SENTENCEPIECE_TOKENS`` with ``decoder``; returns ``folder``."""
    vocabulary = {token: token_id for token_id, token in enumerate(SENTENCEPIECE_TOKENS)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(SENTENCEPIECE_TOKENS[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    return folder
