"""Chat templates: equal to transformers, safe, bounded, and clear when they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.byte_tokenizer import write_byte_tokenizer
from trident_llm.errors import BadRequest, LoadFailed
from trident_llm.text import ChatTemplate, Tokenizer, parse_messages

CONVERSATION = [
    {"role": "system", "content": "Be brief & <b>kind</b>."},
    {"role": "user", "content": "Héllo 🎉 {{ 7 * 7 }}"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "  And   now? \n"},
]
FEATURES = """
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.role == 'end' %}{% break %}{% endif %}
    {{- bos_token }}{{ message | tojson }}{{ message.content | trim }}
    {% generation %}{{ message.content[::-1] }}{% endgeneration %}
{%- endfor %}
{%- set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}
{%- if tools is none and documents is none and add_generation_prompt %}>{{ strftime_now('%Y')[:2] }}{% endif %}
"""


def render(source: str, messages: list[dict[str, Any]], max_chars: int = 10_000) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}, "a file").render(messages, max_chars=max_chars)


@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:2], CONVERSATION[1:]])
def test_equals_transformers_on_smollm2(smollm2_folder: Path, messages: list[dict[str, str]]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_folder)
    ours = Tokenizer(smollm2_folder)
    prompt = ours.render_chat(parse_messages(json.dumps(messages)), max_chars=10_000)
    assert prompt == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ours.encode(prompt, add_special_tokens=False) == expected


def test_equals_transformers_on_every_feature_of_templates(smollm2_folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_folder)
    theirs.bos_token = "<s>"
    messages = [*CONVERSATION, {"role": "skip", "content": "-"}, {"role": "end", "content": "-"}]
    expected = theirs.apply_chat_template(
        messages, chat_template=FEATURES, tokenize=False, add_generation_prompt=True
    )
    assert "<b>kind</b>" in expected
    assert render(FEATURES, messages) == expected


def test_sources_in_order(tmp_path: Path) -> None:
    """chat_template.jinja wins over chat_template.json, and that over tokenizer_config.json and its named list."""
    write_byte_tokenizer(tmp_path)
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "config"}]
    found = []
    for name, text in [
        ("tokenizer_config.json", json.dumps({"chat_template": named})),
        ("chat_template.json", json.dumps({"chat_template": "json"})),
        ("chat_template.jinja", "jinja"),
    ]:
        (tmp_path / name).write_text(text)
        found.append(Tokenizer(tmp_path).render_chat([], max_chars=100))
    assert found == ["config", "json", "jinja"]


def test_model_without_template_says_so(tmp_path: Path) -> None:
    (write_byte_tokenizer(tmp_path) / "tokenizer_config.json").unlink()
    with pytest.raises(BadRequest, match="this model has no chat template"):
        Tokenizer(tmp_path).render_chat(CONVERSATION, max_chars=100)


def test_reason_of_a_refusal_is_passed_on() -> None:
    with pytest.raises(BadRequest, match="refuses them: Unknown role: pirate"):
        render("{{ raise_exception('Unknown role: ' + messages[0].role) }}", [{"role": "pirate", "content": ""}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.missing.deeper }}",
        "{{ 1 / 0 }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ (9999999 ** 9999) * (9999999 ** 99999) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_hostile_template_ends_in_a_bad_request(source: str) -> None:
    with pytest.raises(BadRequest, match="chat template refuses them"):
        render(source, [{"role": "user", "content": "hi"}])


def test_rendered_length_is_capped() -> None:
    with pytest.raises(BadRequest, match="more than 500 characters once rendered"):
        render("{% for i in range(100000) %}{{ messages[0].content }}{% endfor %}", CONVERSATION, max_chars=500)


def test_small_products_are_fine() -> None:
    assert render("{{ 'ab' * 2 }}{{ 2 ** 10 }}{{ 3 * 4 }}{{ 2.5 * 2 }}", []) == "abab1024125.0"


def test_broken_template_names_its_file() -> None:
    with pytest.raises(LoadFailed, match=r"a file: the chat template does not compile: .*endfor"):
        ChatTemplate("{% for m in messages %}", {}, "a file")


def test_text_parts_become_one_content() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    message = {"role": "user", "content": parts, "name": "kept"}
    assert parse_messages([message]) == [{"role": "user", "content": "one\ntwo", "name": "kept"}]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("", "line 1 column 1"),
        ('[{"role": "user",\n "content": }]', "line 2 column 13"),
        ("[" * 100_000, "no JSON"),
        ("9" * 10_000, "no JSON"),
        ("{}", "found dict"),
        ('"hello"', "found str"),
        ("[]", "an empty list"),
        ('["hello"]', r"messages\[0\]: found str"),
        ('[{"role": "user", "content": "a"}, {"content": "b"}]', r"messages\[1\].role"),
        ('[{"role": 3, "content": "b"}]', r"messages\[0\].role"),
        ('[{"role": "user"}]', r"messages\[0\].content"),
        ('[{"role": "user", "content": 5}]', r"messages\[0\].content"),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', r"messages\[0\].content: a part is no text"),
        (json.dumps([{"role": "user", "content": ""}] * 5000), "5000 messages; give at most 4096"),
    ],
)
def test_bad_messages_say_where(raw: str, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        parse_messages(raw)
