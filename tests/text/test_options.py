"""Request options: vLLM's meaning and ranges, and errors that name option, value and what is allowed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trident_llm.documentation import option_docs, options_table
from trident_llm.errors import BadRequest
from trident_llm.option_values import BOUND_NAMES, Bounds
from trident_llm.options import VLLM_DEFAULTS, Defaults, RequestOptions
from trident_llm.protocol import Limits

DOCUMENTED = option_docs()
LIMITS = Limits(max_n=4, max_stop_strings=3, max_logprobs=5, max_prompt_bytes=1000)


def parse(
    defaults: Defaults | None = None, *, beneath: Mapping[str, object] | None = None, **raw: object
) -> RequestOptions:
    return RequestOptions.parse(
        raw, limits=LIMITS, max_model_len=128, vocab_size=100, defaults=defaults or Defaults(), beneath=beneath
    )


def test_defaults() -> None:
    options = parse()
    assert options == RequestOptions()
    assert (options.temperature, options.max_tokens, options.exclude_input_in_output) == (1.0, None, True)
    assert options.sampling_params(seed=7, room=50).max_tokens == 50


@pytest.mark.parametrize(("stream", "excluded"), [(False, False), (True, True), ("true", True)])
def test_defaults_of_vllm_backend(stream: object, excluded: bool) -> None:
    options = parse(VLLM_DEFAULTS, stream=stream)
    assert (options.max_tokens, options.exclude_input_in_output) == (16, excluded)


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("stream", "true", True),
        ("stream", 0, False),
        ("stream", "False", False),
        ("max_tokens", "128", 128),
        ("max_tokens", 128.0, 128),
        ("max_tokens", "1e3", 1000),
        ("max_tokens", 2**63, 2**63),
        ("temperature", "0.7", 0.7),
        ("temperature", 0, 0.0),
        ("temperature", Fraction(1, 2), 0.5),
        ("top_p", 1, 1.0),
        ("top_k", -1, -1),
        ("min_p", "1", 1.0),
        ("seed", 2**64 - 1, 2**64 - 1),
        ("seed", -2, -2),
        ("seed", -1, None),
        ("n", 4, 4),
        ("best_of", 1, 1),
        ("stop", "a, b", ("a, b",)),
        ("stop", "[INST]", ("[INST]",)),
        ("stop", '"quoted"', ('"quoted"',)),
        ("stop", '["a", "b"]', ("a", "b")),
        ("stop", ["a", "b", "a"], ("a", "b")),
        ("stop", [], ()),
        ("stop_token_ids", [1, "2"], (1, 2)),
        ("stop_token_ids", "[1, 2]", (1, 2)),
        ("stop_token_ids", 5, (5,)),
        ("presence_penalty", -2, -2.0),
        ("repetition_penalty", "1.5", 1.5),
        ("logit_bias", {"5": 1, 6: "-2.5"}, {5: 1.0, 6: -2.5}),
        ("logit_bias", '{"99": 100}', {99: 100.0}),
        ("logprobs", 0, 0),
        ("logprobs", False, None),
        ("logprobs", True, 1),
        ("request_priority", "-3", -3),
        ("cache_salt", "tenant", "tenant"),
        ("user", "somebody", "somebody"),
        ("timeout", 1.5, 1.5),
        ("messages", [], []),
        ("adapter", "", ""),
        ("xlora", False, False),
        ("max_tokens", None, None),
    ],
)
def test_accepted(name: str, raw: object, expected: object) -> None:
    value = getattr(parse(**{name: raw}), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("max_tokens", 0, "0 is not allowed; give an integer of at least 1"),
        ("max_tokens", -5, "-5 is not allowed"),
        ("max_tokens", "abc", "'abc' is not allowed"),
        ("max_tokens", True, "True is not allowed"),
        ("max_tokens", 1.5, "1.5 is not allowed"),
        ("max_tokens", float("inf"), "inf is not allowed"),
        ("max_tokens", "1_000", "'1_000' is not allowed"),
        ("max_tokens", "١", "is not allowed"),
        ("max_tokens", "", "'' is not allowed"),
        ("max_tokens", [5], "is not allowed"),
        ("temperature", float("nan"), "nan is not allowed; give a number from 0 to 2"),
        ("temperature", "NaN", "'NaN' is not allowed"),
        ("temperature", "1e999", "'1e999' is not allowed"),
        ("temperature", 10**400, "is not allowed"),
        ("temperature", True, "True is not allowed"),
        ("temperature", -0.1, "-0.1 is not allowed"),
        ("temperature", 2.1, "2.1 is not allowed"),
        ("top_p", 0, "0 is not allowed; give a number greater than 0, up to 1"),
        ("top_p", 1.01, "1.01 is not allowed"),
        ("top_k", -2, "-2 is not allowed; give an integer of at least 1, or 0 or -1 for all"),
        ("min_p", 1.5, "1.5 is not allowed"),
        ("seed", 2**64, "(more than 64 bits)"),
        ("seed", "x", "'x' is not allowed"),
        ("n", 0, "give an integer from 1 to 4"),
        ("n", 5, "5 is not allowed; give an integer from 1 to 4"),
        ("best_of", 2, "2 is not allowed; give 1"),
        ("stop", ["x"] * 1000, "(1000 of them); give one string or a list (JSON) of at most 3 strings"),
        ("stop", json.dumps(["x"] * 1000), "(1000 of them)"),
        ("stop", "", "(an empty stop string)"),
        ("stop", ["a", ""], "(an empty stop string)"),
        ("stop", ["x" * 1025], "(a stop string of 1025 characters)"),
        ("stop", [1], "[1] is not allowed"),
        ("stop", 5, "5 is not allowed"),
        ("stop", "\ud800", "unpaired surrogate at character 0"),
        ("stop_token_ids", [100], "(token id 100 is outside the vocabulary); give a list (JSON) of at most 3 token"),
        ("stop_token_ids", [-1], "token id -1 is outside"),
        ("stop_token_ids", [1] * 4, "(4 of them)"),
        ("stop_token_ids", "one", "'one' is not allowed"),
        ("presence_penalty", 2.5, "2.5 is not allowed; give a number from -2 to 2"),
        ("frequency_penalty", "-3", "'-3' is not allowed"),
        ("repetition_penalty", 0, "0 is not allowed"),
        ("logit_bias", {"100": 1}, "token id 100 is outside the vocabulary"),
        ("logit_bias", {"x": 1}, "is not allowed"),
        ("logit_bias", {"1": 101}, "(the bias of '1' is 101)"),
        ("logit_bias", {"1": float("nan")}, "(the bias of '1' is nan)"),
        ("logit_bias", '{"1": ', "no JSON at line 1 column 7"),
        ("logit_bias", "[" * 100_000, "nested too deeply"),
        ("logit_bias", [1], "[1] is not allowed"),
        ("logit_bias", {i: 1 for i in range(1025)}, "(1025 entries)"),
        ("logprobs", 6, "6 is not allowed; give an integer from 0 to 5"),
        ("logprobs", -1, "-1 is not allowed"),
        ("stream", "maybe", "'maybe' is not allowed; give true or false"),
        ("stream", 2, "2 is not allowed"),
        ("ignore_eos", [], "[] is not allowed"),
        ("messages", 5, "5 is not allowed; give a JSON list of"),
        ("cache_salt", "s" * 1025, "(1025 characters)"),
        ("cache_salt", "\udfff", "unpaired surrogate"),
        ("timeout", -1, "-1 is not allowed"),
        ("request_priority", 2**31, "give an integer of 32 bits"),
        ("adapter", "sql@2", "'sql@2' is not allowed ('sql@2' is no name of an adapter"),
        ("xlora", "maybe", "'maybe' is not allowed; give true or false"),
        ("xlora_top_k", -1, "-1 is not allowed; give an integer of at least 0"),
        ("xlora_temperature", 0, "0 is not allowed; give a number from 0.01 to 100"),
        ("sampling_parameters", "{", "no JSON at line 1 column 2"),
        ("sampling_parameters", "[]", "give a JSON object"),
        ("sampling_parameters", '{"sampling_parameters": "{}"}', "give a JSON object"),
    ],
)
def test_refused(name: str, raw: object, said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(**{name: raw})
    text = str(caught.value)
    assert text.startswith(f"[INVALID_ARG] {name}: ")
    assert said in text


def test_long_values_are_cut_in_errors() -> None:
    for value in ("x" * 10**6, ["x" * 10**6] * 100, {"k" * 10**6: 1}):
        with pytest.raises(BadRequest) as caught:
            parse(max_tokens=value)
        assert len(str(caught.value)) < 200


def test_integer_too_long_to_print_is_refused() -> None:
    with pytest.raises(BadRequest, match="max_tokens: a number of thousands of digits is not allowed"):
        parse(max_tokens=10**5000)


def test_unknown_option_suggests_the_nearest() -> None:
    with pytest.raises(BadRequest, match=r"unknown option 'max_token'; did you mean 'max_tokens'\? Known options: ada"):
        parse(max_token=5)
    with pytest.raises(BadRequest, match=r"unknown option 'zzz'\. Known options: "):
        parse(sampling_parameters='{"zzz": 1}')


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"min_tokens: 17 is more than max_tokens \(16\)"):
        parse(VLLM_DEFAULTS, min_tokens=17)
    with pytest.raises(BadRequest, match=r"min_tokens: 129 is more than max_tokens \(128\)"):
        parse(min_tokens=129)


def test_prompt_in_output_is_refused_with_stream() -> None:
    with pytest.raises(BadRequest, match="exclude_input_in_output: false is not allowed with stream"):
        parse(stream=True, exclude_input_in_output=False)


def test_sampling_parameters_yield_to_explicit_options() -> None:
    carried = json.dumps({"temperature": 0.5, "top_k": 3, "seed": None, "stop": ["x"], "logit_bias": {"5": 1}})
    options = parse(sampling_parameters=carried, temperature=0, top_k=None)
    assert (options.temperature, options.top_k, options.seed, options.stop) == (0.0, 3, None, ("x",))
    assert options.logit_bias == {5: 1.0}


def test_sampling_parameters_win_over_what_lies_beneath() -> None:
    carried = json.dumps({"temperature": 0.5, "top_k": 3, "seed": None})
    beneath = {"temperature": 0.7, "top_k": 4, "seed": 5, "min_p": 0.1, "sampling_parameters": '{"min_p": 0.2, "n": 2}'}
    options = parse(beneath=beneath, sampling_parameters=carried, top_k=2)
    assert (options.temperature, options.top_k, options.seed, options.min_p, options.n) == (0.5, 2, None, 0.1, 2)


def test_vllm_backends_name_for_adapters() -> None:
    assert parse(VLLM_DEFAULTS, sampling_parameters='{"lora_name": "sql"}').adapter == "sql"
    with pytest.raises(BadRequest, match=r"lora_name: 'a b' is not allowed .*; give NAME, or a blend"):
        parse(VLLM_DEFAULTS, lora_name="a b")
    for adapter in ("a", "b"):
        with pytest.raises(BadRequest, match="given under its other name, too"):
            parse(VLLM_DEFAULTS, lora_name="a", adapter=adapter)
    with pytest.raises(BadRequest, match=r"unknown option 'lora_nam'; did you mean 'lora_name'\?"):
        parse(VLLM_DEFAULTS, lora_nam="a")
    with pytest.raises(BadRequest, match="unknown option 'lora_name'"):
        parse(lora_name="a")


def test_a_chat_request_of_tritons_openai_frontend_is_understood() -> None:
    """Its sampling_parameters carry OpenAI's defaults, ``logprobs`` false among them."""
    carried = {
        "frequency_penalty": 0, "ignore_eos": False, "logprobs": False, "n": 1, "presence_penalty": 0,
        "temperature": 0.7, "top_p": 1, "max_tokens": 16, "best_of": 1,
    }  # fmt: skip
    options = parse(VLLM_DEFAULTS, stream=True, exclude_input_in_output=True, sampling_parameters=json.dumps(carried))
    assert (options.temperature, options.logprobs) == (0.7, None)


def test_sampling_params_for_the_engine() -> None:
    options = parse(
        max_tokens=100, min_tokens=80, temperature=0.001, top_k=-1, logit_bias={1: 2}, stop_token_ids=[3],
        return_cumulative_logprob=True,
    )  # fmt: skip
    params = options.sampling_params(seed=9, room=60)
    assert (params.max_tokens, params.min_tokens, params.temperature, params.top_k) == (60, 60, 0.01, 0)
    assert (params.seed, params.logit_bias, params.stop_token_ids, params.logprobs) == (9, {1: 2.0}, (3,), 0)
    assert parse(temperature=0).sampling_params(seed=9, room=60).temperature == 0


def test_every_option_is_documented() -> None:
    names = [row.name for row in DOCUMENTED]
    assert names == [*(field.name for field in dataclasses.fields(RequestOptions)), "sampling_parameters"]
    assert all(row.kind and row.allowed and row.meaning for row in DOCUMENTED)
    rows = {row.name: row for row in DOCUMENTED}
    assert rows["n"].allowed == "an integer from 1 to max_n"
    assert (rows["n"].default, rows["stream"].default, rows["seed"].default) == ("1", "false", "")
    assert all(line.count("|") == 6 for line in options_table().splitlines())
    assert set(Bounds(LIMITS, 100).names()) == set(BOUND_NAMES)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(raw=st.dictionaries(st.sampled_from([row.name for row in DOCUMENTED]), JSON_VALUES, max_size=3))
def test_any_value_is_taken_or_refused_by_name(raw: dict[str, Any]) -> None:
    """Never another error than BadRequest, whatever JSON brings."""
    try:
        options = parse(**raw)
    except BadRequest as error:
        assert any(row.name in error.message for row in DOCUMENTED)
    else:
        params = options.sampling_params(seed=1, room=10)
        assert 0 <= params.temperature <= 2
        assert 1 <= params.max_tokens <= 10
