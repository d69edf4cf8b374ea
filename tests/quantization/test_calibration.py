"""Calibration text to samples, and the refusal of files that are no text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trident_llm.errors import BadRequest
from trident_llm.models.tokenizer_files import write_byte_tokenizer
from trident_llm.quantization.calibration import SHIPPED, CalibrationSettings, Samples, load_samples
from trident_llm.text import Tokenizer

VOCAB = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder, VOCAB)
    return Tokenizer(folder)


def load(tokenizer: Tokenizer, path: Path | str, *, held_out: bool = False, **settings: int) -> Samples:
    calibration = CalibrationSettings(str(path), **{"num_samples": 4, "length": 32, **settings})
    return load_samples(calibration, tokenizer, vocab_size=VOCAB, max_length=512, held_out=held_out)


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_plain_text_is_cut_into_samples_spread_over_all_of_it(tokenizer, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("".join(chr(97 + index // 40) for index in range(1000)))
    samples = load(tokenizer, path)
    assert samples.calibration.shape == (4, 32) and samples.held_out.shape == (0, 32)
    texts = [tokenizer.decode(row) for row in samples.calibration.tolist()]
    assert texts[0] == "a" * 32 and texts[-1] == "y" * 32
    assert texts == sorted(texts) and len(set(texts)) == 4


def test_jsonl_of_texts_and_chats(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = write(tmp_path / "mix.jsonl", {"text": "first"}, {"messages": chat})
    expected = tokenizer.encode("first") + tokenizer.encode(
        tokenizer.render_chat(chat, max_chars=1000), add_special_tokens=False
    )
    samples = load(tokenizer, path, num_samples=1, length=len(expected))
    assert samples.calibration[0].tolist() == expected


def test_held_out_samples_are_none_that_are_calibrated_on(tokenizer, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{index:07}" for index in range(3000)))
    samples = load(tokenizer, path, held_out=True, num_samples=16)
    assert samples.calibration.shape == (16, 32) and samples.held_out.shape == (4, 32)
    rows = [tuple(row) for part in (samples.calibration, samples.held_out) for row in part.tolist()]
    assert len(set(rows)) == 20


def test_what_is_held_out_comes_from_other_sources(tokenizer, tmp_path):
    """A document in pieces is one source, a line that names none is its own; every fifth source is held out."""
    pieces = [("a", "aA"), ("b", "b"), ("c", "c"), ("a", "a"), ("b", "B"), ("d", "d"), ("e", "e"), ("f", "f")]
    lines = [{"source": source, "text": text[-1] * 80} for source, text in pieces]
    del lines[-1]["source"]
    samples = load(tokenizer, write(tmp_path / "sources.jsonl", *lines), held_out=True, num_samples=64, length=16)
    texts = [set(tokenizer.decode(part.flatten().tolist())) for part in (samples.calibration, samples.held_out)]
    assert texts == [set("Aacdef"), set("bB")]
    one = write(tmp_path / "one.jsonl", *lines[:1] * 5)
    assert load(tokenizer, one, held_out=True, length=16).held_out.shape == (1, 16), "the end of a single source"


def test_the_sources_of_the_text_that_ships_are_named(tokenizer):
    records = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
    sources = dict.fromkeys(record["source"] for record in records)
    assert list(sources)[1::5] == [
        "click formatting.py", "chat on computers", "sotu 1962", "sotu 1984", "brotli entropy_encode.c"
    ]  # fmt: skip


def test_a_short_text_gives_fewer_samples(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("x" * 70)
    assert load(tokenizer, path).calibration.shape == (2, 32)
    assert [len(part) for part in vars(load(tokenizer, path, held_out=True)).values()][:2] == [1, 1]


def test_the_digest_follows_content_and_settings(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 100)
    digests = {load(tokenizer, path).digest, load(tokenizer, path, length=16).digest}
    digests.add(load(tokenizer, path, held_out=True).digest)
    assert load(tokenizer, path).digest in digests and len(digests) == 3
    path.write_text("abcdefgi" * 100)
    assert load(tokenizer, path).digest not in digests


def test_the_text_that_ships_is_enough_for_the_defaults(tokenizer):
    samples = load_samples(CalibrationSettings(), tokenizer, vocab_size=VOCAB, max_length=2048, held_out=True)
    assert samples.calibration.shape == (64, 512) and samples.held_out.shape == (16, 512)
    assert SHIPPED.with_name("README.md").is_file()


BROKEN = {
    "nothing": (b"", r"is empty; give UTF-8 text"),
    "spaces": (b" \n\t\n", r"is empty; give UTF-8 text"),
    "zeros": (b"PK\0\0text", r"is binary; give UTF-8 text"),
    "latin1": ("Käse".encode("latin-1"), r"is binary; give UTF-8 text"),
    "short": (b"few words", r"has 9 tokens; at least 32 are needed \(isq_calibration_length 32\)"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_broken_text_is_refused(tokenizer, tmp_path, name, suffix):
    content, message = BROKEN[name]
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(content)
    with pytest.raises(BadRequest, match=rf"isq_calibration: '.*{name}{suffix}' {message}"):
        load(tokenizer, path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: no JSON"),
        ("[" * 100_000, "line 2: no JSON"),
        ('"text"', "line 2: neither text nor chat"),
        ('{"text": 5}', "line 2: neither text nor chat"),
        ('{"prompt": "x"}', 'line 2: neither text nor chat; give {"text": "..."} or {"messages"'),
        ('{"messages": [{"role": "user"}]}', "line 2: neither text nor chat"),
        ('{"source": 5, "text": "x"}', "line 2: source is 5; give a string, or leave it out"),
    ],
)
def test_broken_lines_are_named(tokenizer, tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "x" * 100}) + "\n" + line + "\n")
    with pytest.raises(BadRequest, match=message):
        load(tokenizer, path)


def test_a_missing_file_and_a_folder_are_named(tokenizer, tmp_path):
    with pytest.raises(BadRequest, match=r"gone\.txt' cannot be read \(No such file or directory\)"):
        load(tokenizer, tmp_path / "gone.txt")
    with pytest.raises(BadRequest, match=r"cannot be read \(Is a directory\)"):
        load(tokenizer, tmp_path)
