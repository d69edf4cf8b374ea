"""Reading a model's tokenizer folder, and the errors when it is broken."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tokenizers import decoders

from tests.fakes.byte_tokenizer import write_byte_tokenizer
from tests.text.conftest import write_sentencepiece
from trident_llm.errors import BadRequest, LoadFailed
from trident_llm.text import Tokenizer

SAMPLE = "The capital of France is Paris. é 日本 🎉\n\tdef f(x): return x"


def test_reads_special_tokens_as_strings_and_objects(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_sentencepiece(tmp_path, decoders.Fuse()))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_special_tokens_map_fills_what_the_config_lacks(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "other"}))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")


def test_truncation_in_the_file_is_not_applied(tmp_path: Path) -> None:
    path = write_byte_tokenizer(tmp_path) / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation": truncation}))
    assert len(Tokenizer(tmp_path).encode("longer than two")) == 15


def test_equals_transformers_on_smollm2(smollm2_folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_folder)
    ours = Tokenizer(smollm2_folder)
    ids = ours.encode(SAMPLE)
    assert ids == theirs(SAMPLE)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == SAMPLE
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)


def test_token_text_keeps_spaces_and_special_tokens(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert byte_tokenizer.token_text(ord(" ")) == " "
    assert byte_tokenizer.token_text(256) == "<eos>"
    assert byte_tokenizer.token_text(0xC3) == "\ufffd"
    assert byte_tokenizer.token_text(9999) == ""
    llama = Tokenizer(write_sentencepiece(tmp_path, decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])))
    assert llama.token_text(261) == " the"


def test_unpaired_surrogate_is_a_bad_request(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        byte_tokenizer.encode("a\ud800b")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", b"{", "not a tokenizer"),
        ("tokenizer.json", b'{"model": 1}', "not a tokenizer"),
        ("tokenizer_config.json", b"{", "no JSON"),
        ("tokenizer_config.json", b"\xff", "no JSON"),
        ("tokenizer_config.json", b"[]", "must hold a JSON object"),
        ("tokenizer_config.json", b'{"chat_template": 7}', "chat_template must be a string"),
        ("tokenizer_config.json", b'{"chat_template": "{% for %}"}', "does not compile"),
        ("special_tokens_map.json", b"nonsense", "no JSON"),
        ("chat_template.json", b"1", "must hold a JSON object"),
        ("chat_template.jinja", b"\xff", "not valid UTF-8"),
        ("chat_template.jinja", b"{{ messages", "does not compile"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (write_byte_tokenizer(tmp_path) / name).write_bytes(content)
    with pytest.raises(LoadFailed) as caught:
        Tokenizer(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert reason in str(caught.value)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"tokenizer\.json: no such file"):
        Tokenizer(tmp_path)


def test_memory_does_not_grow_with_the_texts_it_has_seen(byte_tokenizer: Tokenizer) -> None:
    """Each text is one word, nearly as long as any that the library would remember."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh", k=250)) for _ in range(8000)]
    for text in texts[:100]:
        byte_tokenizer.encode(text)
    before = psutil.Process().memory_info().rss
    for text in texts:
        byte_tokenizer.encode(text)
    assert psutil.Process().memory_info().rss - before < 2 * 2**20


def test_text_side_imports_neither_torch_nor_transformers() -> None:
    """Doors start quickly and stay small."""
    code = "import sys, trident_llm.generation; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "[]"
