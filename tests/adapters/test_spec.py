"""How adapters are named in requests and settings."""

from __future__ import annotations

import pytest

from trident_llm import EngineConfig
from trident_llm.adapters.spec import AdapterTerm, format_spec, parse_adapter_list, parse_spec
from trident_llm.errors import BadRequest
from trident_llm.options import RequestOptions
from trident_llm.protocol import Limits

LIMITS = Limits(max_n=1, max_stop_strings=1, max_logprobs=1, max_prompt_bytes=1)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("", ()),
        ("poet", (AdapterTerm("poet"),)),
        ("org/poet-v1.2", (AdapterTerm("org/poet-v1.2"),)),
        ("a:0.7,b:0.3", (AdapterTerm("a", 0.7), AdapterTerm("b", 0.3))),
        (" a : -1.5 , b ", (AdapterTerm("a", -1.5), AdapterTerm("b"))),
    ],
)
def test_a_blend_is_read(text: str, terms: tuple[AdapterTerm, ...]) -> None:
    assert parse_spec(text) == terms
    assert parse_spec(format_spec(terms)) == terms


def test_generations_are_for_the_engine_alone() -> None:
    terms = (AdapterTerm("a", 0.1, generation=12), AdapterTerm("b"))
    assert parse_spec(format_spec(terms), generations=True) == terms
    with pytest.raises(ValueError, match="no name"):
        parse_spec("a@12")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,a:0.5", "'a' comes twice"),
        ("a,", "'' is no name"),
        ("../a", "no name"),
        ("a b", "no name"),
        ("a:", "'' is no weight"),
        ("a:nan", "no weight"),
        ("a:1e999", "out of range"),
        ("a:11", "out of range"),
        ("x" * 201, "no name"),
    ],
)
def test_what_is_no_blend_is_refused_by_name(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_spec(text)
    with pytest.raises(BadRequest, match=rf"adapter: .*{reason}.*; give NAME, or a blend"):
        RequestOptions.parse({"adapter": text}, limits=LIMITS, max_model_len=8, vocab_size=8)


def test_settings_name_paths() -> None:
    assert parse_adapter_list(" a = /x/y , b=z,") == {"a": "/x/y", "b": "z"}
    for text, reason in [("a", "name=path"), ("a=", "name=path"), ("a=1,a=2", "comes twice"), ("a b=1", "no name")]:
        with pytest.raises(BadRequest, match=f"adapters: .*{reason}"):
            EngineConfig(model="m", adapters=text)


def test_slots_must_fit_host_memory() -> None:
    with pytest.raises(BadRequest, match="max_cpu_loras: 3 is less than max_loras"):
        EngineConfig(model="m", max_loras=4, max_cpu_loras=3)
