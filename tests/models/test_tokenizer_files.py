"""Tokenizer folders: converted ones tokenize as transformers does, and byte tokenizers work for any text."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from trident_llm.errors import BadRequest, LoadFailed, NotFound
from trident_llm.models import tokenizer_files
from trident_llm.models.source import ModelSource, resolve_model
from trident_llm.models.tokenizer_files import byte_tokenizer_folder, prepare_tokenizer, write_byte_tokenizer

TEXTS = [
    "",
    "Hello, world!",
    "  leading and   inner spaces\n\n\ttabs ",
    "The year 2024, 3.14159 and 1,000,000.",
    "don't I'll we've",
    "Grüße, naïve café, 中文字符, Русский, العربية, 🙂👩‍👩‍👧",
    "<|im_start|>user\nHi<|im_end|>\n",
    "def f(x):\n    return x ** 2  # squares\n",
    "a" * 500,
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trident" / "tokenizers"


def folder_source(folder: Path) -> ModelSource:
    return ModelSource(name="model", folder=folder, weight_files=(), format="safetensors")


def test_gguf_tokenizer_equals_transformers(smollm2_gguf: Path, cache: Path) -> None:
    from transformers import AutoTokenizer

    lines: list[str] = []
    source = resolve_model(str(smollm2_gguf))
    folder = prepare_tokenizer(source, progress=lines.append)
    oracle = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, local_files_only=True)
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        ids = oracle(text).input_ids
        assert ours.encode(text).ids == ids, text
        assert ours.decode(ids, skip_special_tokens=False) == oracle.decode(ids, clean_up_tokenization_spaces=False)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == (oracle.bos_token, oracle.eos_token)
    assert (folder / "chat_template.jinja").read_text() == oracle.chat_template
    assert len(lines) == 1 and str(source.name) in lines[0]
    assert prepare_tokenizer(source, progress=lines.append) == folder and len(lines) == 1
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_folder_with_tokenizer_json_is_used_as_it_is(tmp_path: Path, cache: Path) -> None:
    write_byte_tokenizer(tmp_path / "model", 300)
    assert prepare_tokenizer(folder_source(tmp_path / "model")) == tmp_path / "model"
    assert not cache.exists()


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no tokenizer: none of tokenizer\.json, tokenizer\.model, vocab\.json"):
        prepare_tokenizer(folder_source(tmp_path))


def write_vocab_and_merges(folder: Path, merges: list[str]) -> Path:
    """The files of a Qwen2 tokenizer of old: byte-level BPE without tokenizer.json."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(exist_ok=True)
    tokens = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "chat_template": "{{ 1 }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_vocab_and_merges_are_converted(tmp_path: Path, cache: Path) -> None:
    from transformers import AutoTokenizer

    model = write_vocab_and_merges(tmp_path / "model", ["l l", "h e", "he ll", "Ġ w"])
    folder = prepare_tokenizer(folder_source(model))
    oracle = AutoTokenizer.from_pretrained(model)
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*TEXTS, "hello world"]:
        assert ours.encode(text).ids == oracle(text).input_ids, text
    assert folder.parent == cache
    changed = write_vocab_and_merges(tmp_path / "model", ["l l", "h e", "Ġ w"])
    assert prepare_tokenizer(folder_source(changed)) != folder


def write_sentencepiece(folder: Path) -> Path:
    """A tokenizer.model (BPE with byte fallback) in protobuf's wire format, and its tokenizer_config.json."""
    pieces: list[tuple[str, float, int]] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(piece, -float(rank), 1) for rank, piece in enumerate(["▁h", "el", "▁hel", "lo", "▁hello", "▁w"])]
    pieces += [(letter, -100.0 - rank, 1) for rank, letter in enumerate("▁helowrd")]
    model = b""
    for text, score, kind in pieces:
        raw = text.encode()
        piece = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        model += b"\x0a" + bytes([len(piece)]) + piece
    trainer = b"\x18\x02\x98\x02\x01"
    model += b"\x12" + bytes([len(trainer)]) + trainer
    (folder / "tokenizer.model").write_bytes(model)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                "add_bos_token": True}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def test_sentencepiece_model(tmp_path: Path) -> None:
    """Converted where the optional package sentencepiece is installed; elsewhere the error says what to install."""
    source = folder_source(write_sentencepiece(tmp_path))
    if importlib.util.find_spec("sentencepiece") is None:
        with pytest.raises(LoadFailed, match=r"tokenizer\.model: converting it needs the package sentencepiece"):
            prepare_tokenizer(source)
        return
    ours = Tokenizer.from_file(str(prepare_tokenizer(source) / "tokenizer.json"))
    pieces = ["<s>", "▁hello", "▁w", "o", "r", "l", "d", "▁", "<0xC3>", "<0x9F>"]
    assert ours.encode("hello world ß").tokens == pieces
    assert ours.decode(ours.encode("hello world ß").ids) == "hello world ß"


def test_unusable_files_name_the_model(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(LoadFailed, match="cannot be converted") as caught:
        prepare_tokenizer(folder_source(tmp_path))
    assert str(tmp_path) in caught.value.message and list(cache.iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(LoadFailed, match="XDG_CACHE_HOME"):
        byte_tokenizer_folder(300)


def test_a_second_process_may_be_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes the same folder while this one is writing."""
    write = tokenizer_files.write_byte_tokenizer

    def slowly(folder: Path, vocab_size: int) -> None:
        write(folder, vocab_size)
        write(cache / "bytes-300", vocab_size)

    monkeypatch.setattr(tokenizer_files, "write_byte_tokenizer", slowly)
    folder = byte_tokenizer_folder(300)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == 300
    assert list(cache.iterdir()) == [folder]


@pytest.mark.parametrize("vocab_size", [259, 320, 32000])
def test_byte_tokenizer(tmp_path: Path, vocab_size: int) -> None:
    from transformers import AutoTokenizer

    write_byte_tokenizer(tmp_path, vocab_size)
    ours, oracle = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.get_vocab_size() == len(oracle) == vocab_size
    for text in [*TEXTS, "t300 <s>x</s>"]:
        ids = ours.encode(text).ids
        assert ids == oracle(text).input_ids and max(ids, default=0) < 259
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert (oracle.bos_token_id, oracle.eos_token_id) == (1, 2)
    assert all(ours.decode([token_id]) for token_id in range(3, vocab_size))
    chat: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
    assert oracle.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "user: hi\nassistant: "


def test_vocabulary_too_small_for_bytes(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="258 is less than the 259 tokens"):
        write_byte_tokenizer(tmp_path, 258)


def test_transformers_is_imported_for_conversions_only() -> None:
    code = (
        "import sys, trident_llm.models.tokenizer_files, trident_llm.models.source;"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'torch', 'huggingface_hub')))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60).returncode == 0
