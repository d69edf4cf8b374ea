"""Fields of OpenAI's requests as options of the server. Ranges of values are the server's to check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ApiError, bad_value, unsupported

_SAME = (
    "temperature", "top_p", "n", "seed", "stop", "presence_penalty", "frequency_penalty", "logit_bias", "user",
    "max_tokens",
)  # fmt: skip
EXTRA = (
    "top_k", "min_p", "min_tokens", "repetition_penalty", "stop_token_ids", "ignore_eos", "cache_salt",
    "request_priority", "timeout", "xlora_top_k", "xlora_temperature",
)  # fmt: skip
"""The server's own options, which clients send as extra fields."""
IGNORED = ("metadata", "service_tier", "prompt_cache_key", "safety_identifier")
"""They change nothing about an answer of this server."""
_SHARED = frozenset({"model", "stream", "stream_options", "logprobs", *_SAME, *EXTRA, *IGNORED})
_CHAT = _SHARED | {"messages", "top_logprobs", "max_completion_tokens"}
_COMPLETION = _SHARED | {"prompt"}

_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}
"""Features that this server does not have, with the values that ask for none of them."""
_COMPLETION_TOKENS = 16
"""What OpenAI's completions write unless told otherwise."""


def generation_options(body: Mapping[str, Any], *, chat: bool, counts: bool) -> dict[str, Any]:
    """Options for the server from the fields of a request; null is the same as not given. ``counts``: whether numbers
    of tokens are wanted, which cost the server and the gateway time with each token.

    Raises ``ApiError`` for fields that are unknown or not supported.
    """
    given = {name: value for name, value in body.items() if value is not None}
    _refuse_others(given, _CHAT if chat else _COMPLETION)
    options = {name: given[name] for name in (*_SAME, *EXTRA) if name in given}
    if "max_completion_tokens" in given:
        if "max_tokens" in given:
            raise bad_value("max_completion_tokens", "give it or max_tokens, not both")
        options["max_tokens"] = given["max_completion_tokens"]
    if not chat:
        options.setdefault("max_tokens", _COMPLETION_TOKENS)
    logprobs = _chat_logprobs(given) if chat else _completion_logprobs(given)
    if logprobs is not None:
        options["logprobs"] = logprobs
    names = ("return_num_input_tokens", "return_num_output_tokens", "return_num_cached_tokens")
    return {**options, **dict.fromkeys(names, counts)}


def renamed_options(body: Mapping[str, Any]) -> dict[str, str]:
    """Names of the server's options -> those of the request that stand for them."""
    renamed = {"text_input": "prompt"}
    if body.get("max_completion_tokens") is not None:
        renamed["max_tokens"] = "max_completion_tokens"
    if body.get("top_logprobs") is not None:
        renamed["logprobs"] = "top_logprobs"
    return renamed


def flag(given: Mapping[str, Any], name: str) -> bool:
    """A field that is true, false, or not given, which is false."""
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_value(name, f"{value!r:.200} is not allowed; give true or false")
    return bool(value)


def includes_usage(body: Mapping[str, Any], stream: bool) -> bool:
    """Whether ``stream_options`` asks for the usage."""
    wanted = body.get("stream_options")
    if wanted is None:
        return False
    if not stream:
        raise bad_value("stream_options", "it is only allowed with stream true")
    if not isinstance(wanted, dict) or set(wanted) - {"include_usage", "include_obfuscation"}:
        raise bad_value("stream_options", f'{wanted!r:.200} is not allowed; give {{"include_usage": true}}')
    return flag(wanted, "include_usage")


def _refuse_others(given: Mapping[str, Any], known: frozenset[str]) -> None:
    for name, value in given.items():
        if name in known:
            continue
        if name not in _HARMLESS:
            raise ApiError(400, f"{name[:200]}: unknown field", param=name[:200], code="unknown_parameter")
        if value not in _HARMLESS[name]:
            raise unsupported(name, "this server does not support it; leave it out")


def _chat_logprobs(given: Mapping[str, Any]) -> Any:
    wanted = flag(given, "logprobs")
    if "top_logprobs" in given and not wanted:
        raise bad_value("top_logprobs", "it needs logprobs true")
    return given.get("top_logprobs", 0) if wanted else None


def _completion_logprobs(given: Mapping[str, Any]) -> Any:
    if isinstance(given.get("logprobs"), bool):
        raise bad_value("logprobs", "a boolean is not allowed here; give the number of most likely tokens")
    return given.get("logprobs")
