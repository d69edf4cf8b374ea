"""Requests that both generation doors must refuse, each with the text of its error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_PROMPT_BYTES = 4 * 1024 * 1024
_IDS = "token ids from 0 to 257 - 1"
_NAME = "a string of at most 1024 characters"
_BOOLEAN = "true or false"
ALLOWED = {
    "max_tokens": "an integer of at least 1",
    "min_tokens": "an integer from 0 to max_tokens",
    "temperature": "a number from 0 to 2",
    "top_p": "a number greater than 0, up to 1",
    "top_k": "an integer of at least 1, or 0 or -1 for all",
    "min_p": "a number from 0 to 1",
    "seed": "an integer of 64 bits; -1 draws one",
    "n": "an integer from 1 to 16",
    "best_of": "1",
    "stop": "one string or a list (JSON) of at most 16 strings of 1 to 1024 characters",
    "stop_token_ids": f"a list (JSON) of at most 16 {_IDS}",
    "ignore_eos": _BOOLEAN,
    "presence_penalty": "a number from -2 to 2",
    "frequency_penalty": "a number from -2 to 2",
    "repetition_penalty": "a number from 0.001 to 1000",
    "logit_bias": f"a JSON object of at most 1024 {_IDS} with numbers from -100 to 100",
    "logprobs": "an integer from 0 to 20",
    "request_priority": "an integer of 32 bits",
    "user": _NAME,
    "cache_salt": _NAME,
    "return_logprobs": _BOOLEAN,
    "timeout": "a number of seconds of at least 0; 0: none",
    "adapter": "NAME, or a blend NAME:WEIGHT,NAME:WEIGHT,... with weights from -10 to 10",
    "xlora": _BOOLEAN,
    "xlora_top_k": "an integer of at least 0, at most the mix's adapters; 0: all",
    "xlora_temperature": "a number from 0.01 to 100",
    "calibration": _BOOLEAN,
    "sampling_parameters": "a JSON object, in a string, of other options",
}
"""What the fake engine's server lets each option be, as errors say it."""


@dataclass(frozen=True)
class Bad:
    """A request and how the error begins that it gets, code apart."""

    error: str
    options: Mapping[str, object] = field(default_factory=dict)
    prompt: str | bytes = "hello"


def _value(name: str, value: object, detail: str = "", shown: str = "") -> Bad:
    """``detail``: what the error says about the value; ``shown``: how it begins when it is too long to be shown."""
    allowed = f" is not allowed{f' ({detail})' if detail else ''}; give {ALLOWED[name]}"
    return Bad(f"{name}: {shown}" if shown else f"{name}: {value!r}{allowed}", {name: value})


def _carried(name: str, value: object) -> Bad:
    """In sampling_parameters: clients of gRPC may not name it themselves, or it is a tensor on one of the doors."""
    return Bad(_value(name, value).error, {"sampling_parameters": json.dumps({name: value})})


def _messages(text: str, error: str) -> Bad:
    return Bad(error, {"messages": text}, prompt="")


def _second(**message: object) -> str:
    return json.dumps([{"role": "user", "content": "hi"}, message])


_LIST = 'give a JSON list of {"role": ..., "content": ...}'
_ADAPTER_NAME = "give 1 to 200 letters, digits or any of . _ - /, the first a letter or digit, without .."

BAD: dict[str, Bad] = {
    "empty prompt": Bad("text_input: empty; give at least one character of text", prompt=""),
    "long prompt": Bad("text_input: 5000 tokens; at most 4095 are allowed, because prompt and ", prompt="x" * 5000),
    "10 MB": Bad(
        f"text_input: at least 10000000 bytes; at most {MAX_PROMPT_BYTES} (max_prompt_bytes)", prompt="x" * 10_000_000
    ),
    "no UTF-8": Bad("text_input: not valid UTF-8 at byte 3 (ff); send UTF-8 text", prompt=b"caf\xff"),
    "messages and prompt": Bad("text_input: must be empty when messages is given", {"messages": _second()}),
    "messages: no JSON": _messages("hello", f"messages: no JSON at line 1 column 1: Expecting value; {_LIST}"),
    "messages: nested": _messages("[" * 100_000, "messages: no JSON ("),
    "messages: object": _messages('{"role": "user"}', f"messages: found dict; {_LIST}"),
    "messages: none": _messages("[]", f"messages: found an empty list; {_LIST}"),
    "messages: number": _messages("[5]", f"messages[0]: found int; {_LIST}"),
    "messages: no role": _messages(
        _second(content="x"), "messages[1].role: missing or no string; give system, user or assistant"
    ),
    "messages: no content": _messages(
        _second(role="user"), "messages[1].content: missing or no string; give a string or a list of text parts"
    ),
    "messages: image": _messages(
        _second(role="user", content=[{"type": "image_url"}]), "messages[1].content: a part is no text; give {"
    ),
    "messages: 4,097": _messages(json.dumps([{}] * 4097), "messages: 4097 messages; give at most 4096"),
    "messages: 10 MB": _messages(
        _second(role="user", content="x" * 10_000_000),
        f"messages: at least 10000068 bytes; at most {MAX_PROMPT_BYTES} (max_prompt_bytes)",
    ),
    "unknown option": Bad("unknown option 'temprature'; did you mean 'temperature'? Known ", {"temprature": 1}),
    "alien option": Bad("unknown option 'zzz'. Known options: adapter, best_of, ", {"zzz": 1}),
    "max_tokens: 0": _value("max_tokens", 0),
    "max_tokens: negative": _value("max_tokens", -4),
    "max_tokens: word": _value("max_tokens", "abc"),
    "max_tokens: fraction": _value("max_tokens", 1.5),
    "max_tokens: 65 bits": _value("max_tokens", str(2**64), "more than 64 bits"),
    "max_tokens: 5,000 digits": _value("max_tokens", "9" * 5000, shown="'99999"),
    "min_tokens: negative": _value("min_tokens", -1),
    "min_tokens: above": Bad(
        "min_tokens: 20 is more than max_tokens (5); give at most that", {"min_tokens": 20, "max_tokens": 5}
    ),
    "temperature: NaN": _value("temperature", "NaN"),
    "temperature: infinite": _value("temperature", "inf"),
    "temperature: high": _value("temperature", 2.5),
    "top_p": _value("top_p", 0),
    "top_k": _value("top_k", -2),
    "min_p": _value("min_p", -0.5),
    "seed: word": _value("seed", "x"),
    "seed: 65 bits": _value("seed", str(2**64), "more than 64 bits"),
    "n: 0": _value("n", 0),
    "n: 17": _value("n", 17),
    "best_of": _value("best_of", 2),
    "stop: 1,000": _value("stop", json.dumps([str(i) for i in range(1000)]), shown="'[\"0\", \"1\", "),
    "stop: empty": _value("stop", '["a",""]', "an empty stop string"),
    "stop: long": _value("stop", "x" * 1025, shown="'xxx"),
    "stop_token_ids": _value("stop_token_ids", "[257]", "token id 257 is outside the vocabulary"),
    "ignore_eos": _value("ignore_eos", "maybe"),
    "presence_penalty": _value("presence_penalty", 2.5),
    "frequency_penalty": _value("frequency_penalty", -3),
    "repetition_penalty": _value("repetition_penalty", 0),
    "logit_bias: list": _value("logit_bias", "[1]"),
    "logit_bias: value": _value("logit_bias", '{"1": 101}', "the bias of '1' is 101"),
    "logit_bias: token": _value("logit_bias", '{"999": 1}', "token id 999 is outside the vocabulary"),
    "logit_bias: 1,025": _value("logit_bias", json.dumps(dict.fromkeys(range(1025), 1)), shown="'{\"0\": 1, \"1\""),
    "logprobs: 21": _value("logprobs", 21),
    "logprobs: negative": _value("logprobs", -1),
    "request_priority": _value("request_priority", 2**31),
    "user": _value("user", "u" * 1025, shown="'uuu"),
    "cache_salt": _value("cache_salt", "s" * 1025, shown="'sss"),
    "timeout: negative": _carried("timeout", -1),
    "timeout: word": _carried("timeout", "soon"),
    "adapter: name": _value("adapter", "../up", f"'../up' is no name of an adapter; {_ADAPTER_NAME}"),
    "adapter: weight": _value("adapter", "a:11", "the weight 11 is out of range"),
    "adapter: twice": _value("adapter", "a,a", "'a' comes twice"),
    "xlora": _value("xlora", "maybe"),
    "xlora_top_k": _value("xlora_top_k", -1),
    "xlora_temperature": _value("xlora_temperature", 0),
    "calibration": _value("calibration", "maybe"),
    "prompt in a stream": Bad(
        "exclude_input_in_output: false is not allowed with stream; give true, or stream false",
        {"stream": True, "exclude_input_in_output": False},
    ),
    "carrier: no JSON": _value(
        "sampling_parameters", "{", "no JSON at line 1 column 2: Expecting property name enclosed in double quotes"
    ),
    "carrier: list": _value("sampling_parameters", "[]"),
    "carrier: carrier": _value("sampling_parameters", '{"sampling_parameters": "{}"}'),
    "carrier: option": _carried("return_logprobs", "maybe"),
}  # fmt: skip
