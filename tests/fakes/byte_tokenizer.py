"""A tokenizer whose token ids are bytes: 0 to 255 stand for themselves, 256 ends a sequence."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

EOS_TOKEN_ID = 256
VOCAB_SIZE = 257

CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}:{{ message.content }}\n{% endfor %}assistant:"


def byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers use for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def write_byte_tokenizer(folder: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json into ``folder``; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "chat_template": CHAT_TEMPLATE, "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
