"""From a prompt and options to what is submitted, or why not."""

from __future__ import annotations

import json

import pytest

from tests.text.generations import WELCOME, start
from trident_llm.errors import BadRequest
from trident_llm.generation import Generation, decode_prompt
from trident_llm.options import RequestOptions
from trident_llm.protocol import SampleStart
from trident_llm.text import Tokenizer


def test_submit_carries_the_request(byte_tokenizer: Tokenizer) -> None:
    generation = start(
        byte_tokenizer, "Hé", n=2, seed=5, temperature=0.5, request_priority=-1, cache_salt="s", logprobs=2, user="u"
    )
    submit = generation.submit()
    assert (submit.request_id, submit.prompt_ids) == ("r", list("Hé".encode()))
    assert submit.samples == [SampleStart(index=0), SampleStart(index=1)]
    assert submit.user == "u"
    assert (submit.priority, submit.cache_salt, submit.params.seed, submit.params.logprobs) == (-1, "s", 5, 2)
    assert submit.params.max_tokens == 64 - 3


def test_seed_is_drawn_once(byte_tokenizer: Tokenizer) -> None:
    one, two = start(byte_tokenizer), start(byte_tokenizer)
    assert one.submit().params.seed == one.submit().params.seed
    assert one.submit().params.seed != two.submit().params.seed


def test_max_tokens_is_cut_to_the_context(byte_tokenizer: Tokenizer) -> None:
    assert start(byte_tokenizer, max_tokens=1000, min_tokens=100).params.max_tokens == 59
    assert start(byte_tokenizer, max_tokens=1000, min_tokens=100).params.min_tokens == 59
    assert start(byte_tokenizer, "x" * 63).params.max_tokens == 1


def test_messages_are_rendered(byte_tokenizer: Tokenizer) -> None:
    messages = json.dumps([{"role": "user", "content": "hi"}])
    generation = start(byte_tokenizer, "", messages=messages)
    assert generation.prompt == "user:hi\nassistant:"
    assert generation.prompt_ids == list(b"user:hi\nassistant:")
    assert start(byte_tokenizer, "", messages=json.loads(messages)).prompt == generation.prompt


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("", {}, "text_input: empty"),
        ("x" * 64, {}, "text_input: 64 tokens; at most 63 are allowed.* 64 \\(max_model_len\\)"),
        ("x" * 201, {}, "text_input: at least 201 bytes; at most 200 \\(max_prompt_bytes\\) are allowed"),
        ("é" * 101, {}, "text_input: at least 202 bytes"),
        ("a\ud800", {}, "text_input: unpaired surrogate at character 1"),
        ("", {"messages": "nonsense"}, "messages: no JSON at line 1 column 1"),
        ("", {"messages": "[" + " " * 200 + "]"}, "messages: at least 202 bytes"),
        ("", {"messages": [{"role": "user", "content": "x" * 64}]}, "messages: 80 tokens; at most 63"),
        ("", {"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ("hi", {"messages": []}, "text_input: must be empty when messages is given"),
    ],
)
def test_bad_prompt_is_refused(byte_tokenizer: Tokenizer, prompt: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        start(byte_tokenizer, prompt, **options)


def test_long_prompt_is_refused_before_tokenizing() -> None:
    options = RequestOptions.parse({}, limits=WELCOME.limits, max_model_len=64, vocab_size=257)
    with pytest.raises(BadRequest, match="at least 10000000 bytes"):
        Generation("r", "x" * 10_000_000, options, object(), WELCOME)  # type: ignore[arg-type]


def test_decode_prompt() -> None:
    assert decode_prompt("é".encode()) == "é"
    with pytest.raises(BadRequest, match=r"text_input: not valid UTF-8 at byte 2 \(ff fe\)"):
        decode_prompt(b"ab\xff\xfe")
    with pytest.raises(BadRequest, match="messages: not valid UTF-8"):
        decode_prompt(b"\xe2\x82", "messages")
