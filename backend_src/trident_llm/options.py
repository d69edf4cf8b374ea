"""RequestOptions: every option of a request, its type, range, default and meaning, read from untyped values.

Names and meaning are those of NVIDIA's vllm_backend and vLLM's SamplingParams where they have them. It does not know
where values come from: request parameters, input tensors and keyword arguments all pass through ``parse``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .adapters.spec import SPEC_RULE
from .errors import BadRequest
from .option_values import (
    MAX_LOGIT_BIASES,
    MAX_STOP_CHARS,
    Bounds,
    Reader,
    adapter_spec,
    boolean,
    chat_messages,
    integer,
    logit_biases,
    logprobs_count,
    name,
    number,
    read_json,
    seed_value,
    shown,
    stop_strings,
    token_ids,
)
from .protocol import Limits, SamplingParams

_LEAST_TEMPERATURE = 0.01
_BOOLEAN = "true or false"


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Defaults, names and precedence that differ between the two generation doors."""

    max_tokens: int | None = None
    """None: to the end of the context."""
    exclude_input_in_output: bool | None = True
    """None: the value of ``stream``, as vllm_backend has it."""
    other_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Options by further names that requests may give them."""
    carrier_wins: bool = False
    """Whether ``sampling_parameters`` wins over request parameters of the Triton server."""


LLM_DEFAULTS = Defaults()
VLLM_DEFAULTS = Defaults(
    max_tokens=16, exclude_input_in_output=None, other_names={"lora_name": "adapter"}, carrier_wins=True
)


def option(default: Any, kind: str, read: Reader, allowed: str, meaning: str, *, available: bool = True) -> Any:
    """A dataclass field with its reader and its documentation. ``allowed`` may name limits in braces."""
    metadata = {"kind": kind, "read": read, "allowed": allowed, "meaning": meaning, "available": available}
    return dataclasses.field(default=default, metadata=metadata)


def flag(default: bool, meaning: str, *, available: bool = True) -> Any:
    return option(default, "bool", boolean, _BOOLEAN, meaning, available=available)


def penalty(meaning: str) -> Any:
    return option(0.0, "float", number(-2, 2), "a number from -2 to 2", meaning)


_IDS = "token ids from 0 to {vocab_size} - 1"


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """Checked options of one request. Make it with ``parse``: the constructor checks nothing."""

    stream: bool = flag(False, "answer piece by piece, as text comes")
    messages: str | Sequence[Any] | None = option(
        None, "JSON", chat_messages, 'a JSON list of {{"role": ..., "content": ...}}',
        "chat messages for the model's own template; text_input is then empty",
    )
    max_tokens: int | None = option(
        None, "int", integer(1), "an integer of at least 1",
        "most output tokens per sample; what does not fit into the context is cut",
    )
    min_tokens: int = option(
        0, "int", integer(0), "an integer from 0 to max_tokens",
        "output tokens before the end of sequence, a stop token or a stop string may end a sample",
    )
    temperature: float = option(
        1.0, "float", number(0, 2), "a number from 0 to 2",
        f"0: the most likely token; other values below {_LEAST_TEMPERATURE} count as {_LEAST_TEMPERATURE}",
    )
    top_p: float = option(
        1.0, "float", number(high=1, above=0), "a number greater than 0, up to 1",
        "sample from the most likely tokens that together have this probability",
    )
    top_k: int = option(
        0, "int", integer(-1), "an integer of at least 1, or 0 or -1 for all",
        "sample from this many most likely tokens",
    )
    min_p: float = option(
        0.0, "float", number(0, 1), "a number from 0 to 1",
        "drop tokens less likely than this share of the most likely one's probability",
    )
    seed: int | None = option(
        None, "int", seed_value, "an integer of 64 bits; -1 draws one",
        "equal seeds and options give equal samples; unset: drawn",
    )
    n: int = option(1, "int", integer(1, "max_n"), "an integer from 1 to {max_n}", "samples of the same prompt")
    best_of: int = option(1, "int", integer(1, 1), "1", "for OpenAI clients, which send it")
    stop: tuple[str, ...] = option(
        (), "str or list", stop_strings,
        f"one string or a list (JSON) of at most {{max_stop_strings}} strings of 1 to {MAX_STOP_CHARS} characters",
        "text that ends a sample; neither it nor what follows is part of the output",
    )
    stop_token_ids: tuple[int, ...] = option(
        (), "list of int", token_ids, "a list (JSON) of at most {max_stop_strings} " + _IDS,
        "tokens that end a sample, besides the model's end of sequence; not part of the text",
    )
    ignore_eos: bool = flag(False, "go on after the model's end of sequence")
    presence_penalty: float = penalty("subtracted from the logits of tokens that the output has")
    frequency_penalty: float = penalty("subtracted from a token's logit, times how often the output has it")
    repetition_penalty: float = option(
        1.0, "float", number(0.001, 1000), "a number from 0.001 to 1000",
        "divides positive and multiplies negative logits of tokens that prompt or output have",
    )
    logit_bias: Mapping[int, float] | None = option(
        None, "JSON", logit_biases,
        f"a JSON object of at most {MAX_LOGIT_BIASES} {_IDS} with numbers from -100 to 100",
        "added to the logits of these tokens",
    )
    logprobs: int | None = option(
        None, "int", logprobs_count, "an integer from 0 to {max_logprobs}",
        "log-probabilities to compute: the chosen token's and this many most likely ones'",
    )
    exclude_input_in_output: bool = flag(
        True, "leave the prompt out of text_output; false only without stream. Default on llm_vllm: as stream"
    )
    return_finish_reason: bool = flag(False, "output finish_reason: stop, length, cancelled, error; None before")
    return_cumulative_logprob: bool = flag(False, "output cumulative_logprob: of all output tokens so far")
    return_logprobs: bool = flag(False, "output logprobs: JSON, of this response's tokens; null without logprobs")
    return_num_input_tokens: bool = flag(False, "output num_input_tokens: tokens of the prompt")
    return_num_output_tokens: bool = flag(False, "output num_output_tokens: tokens of this response")
    return_num_cached_tokens: bool = flag(False, "output num_cached_tokens: prompt tokens from the prefix cache")
    request_priority: int = option(
        0, "int", integer(-(2**31), 2**31 - 1), "an integer of 32 bits", "lower runs first and is preempted last"
    )
    user: str = option(
        "", "str", name, "a string of at most 1024 characters",
        "whose request it is: when there is not room for all, users get equal shares",
    )
    cache_salt: str = option(
        "", "str", name, "a string of at most 1024 characters",
        "prefix-cache blocks are shared only between requests with equal salts",
    )
    timeout: float | None = option(
        None, "float", number(0), "a number of seconds of at least 0; 0: none", "cancel the request after this time"
    )
    adapter: str = option(
        "", "str", adapter_spec, SPEC_RULE,
        "loaded adapters to answer with: one, or several with fixed weights. On llm_vllm also lora_name",
    )
    xlora: bool | None = option(
        None, "bool", boolean, _BOOLEAN,
        "answer with the X-LoRA mix. Default: when one is loaded and adapter names nothing",
    )
    xlora_top_k: int | None = option(
        None, "int", integer(0), "an integer of at least 0, at most the mix's adapters; 0: all",
        "adapters of the mix per token and module. Default: top_k_adapters",
    )
    xlora_temperature: float | None = option(
        None, "float", number(0.01, 100), "a number from 0.01 to 100", "of the mix's softmax. Default: the mix's own"
    )
    return_scalings: bool = flag(False, "output scalings: JSON, mean scaling by adapter of the mix; null without one")
    return_layer_scalings: bool = flag(
        False, "output layer_scalings: JSON, scalings by adapter and layer for each of this response's tokens; or null"
    )
    calibration: bool = flag(
        False, "this request's tokens may be kept in memory, and quantized weights calibrated on them, by calibrate"
    )

    @classmethod
    def parse(
        cls,
        raw: Mapping[str, object],
        *,
        limits: Limits,
        max_model_len: int,
        vocab_size: int,
        defaults: Defaults = LLM_DEFAULTS,
        beneath: Mapping[str, object] | None = None,
    ) -> RequestOptions:
        """Options from untyped values; numbers and booleans may come as strings, None means not given.

        ``sampling_parameters`` (a JSON object in a string) carries any of the other options, which win over it;
        options ``beneath`` yield to both. Raises ``BadRequest`` that names the option, the value and what is allowed.
        """
        values: dict[str, Any] = {}
        bounds = Bounds(limits, vocab_size)
        for key, value in {**_merged(beneath or {}), **_merged(raw)}.items():
            field = _FIELDS.get(defaults.other_names.get(key, key))
            if field is None:
                raise BadRequest(_unknown(key, defaults.other_names))
            if value is not None:
                if field.name in values:
                    raise BadRequest(f"{key}: {shown(value)}: given under its other name, too; give one of them")
                values[field.name] = _read(field, value, bounds, key)
        values.setdefault("max_tokens", defaults.max_tokens)
        exclude = defaults.exclude_input_in_output
        values.setdefault("exclude_input_in_output", values.get("stream", False) if exclude is None else exclude)
        options = cls(**values)
        options._check_together(max_model_len)
        return options

    def sampling_params(self, *, seed: int, room: int) -> SamplingParams:
        """For the engine, when ``room`` tokens of the context are free: more than that is never asked for."""
        max_tokens = room if self.max_tokens is None else min(self.max_tokens, room)
        logprobs = 0 if self.logprobs is None and self.return_cumulative_logprob else self.logprobs
        temperature = self.temperature and max(self.temperature, _LEAST_TEMPERATURE)
        return SamplingParams(
            seed=seed,
            max_tokens=max_tokens,
            min_tokens=min(self.min_tokens, max_tokens),
            temperature=temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=dict(self.logit_bias or {}),
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )

    def _check_together(self, max_model_len: int) -> None:
        most = max_model_len if self.max_tokens is None else self.max_tokens
        if self.min_tokens > most:
            raise BadRequest(f"min_tokens: {self.min_tokens} is more than max_tokens ({most}); give at most that")
        if self.stream and not self.exclude_input_in_output:
            raise BadRequest("exclude_input_in_output: false is not allowed with stream; give true, or stream false")


_FIELDS = {field.name: field for field in dataclasses.fields(RequestOptions)}
CARRIER = "sampling_parameters"
"""What is no option itself but carries others."""
CARRIER_ALLOWED = "a JSON object, in a string, of other options"


def _merged(raw: Mapping[str, object]) -> dict[str, object]:
    """The given options, with those of ``sampling_parameters`` beneath them."""
    carried = raw.get(CARRIER)
    if carried is None:
        return {key: value for key, value in raw.items() if key != CARRIER}
    detail = ""
    try:
        beneath = read_json(carried) if isinstance(carried, str) else carried
    except ValueError as error:
        beneath, detail = None, str(error)
    if not isinstance(beneath, Mapping) or CARRIER in beneath:
        raise BadRequest(_refusal(CARRIER, carried, detail, CARRIER_ALLOWED))
    return {**beneath, **{key: value for key, value in raw.items() if key != CARRIER and value is not None}}


def _read(field: dataclasses.Field[Any], value: object, bounds: Bounds, name: str) -> Any:
    """``name``: the one under which the request has the option."""
    try:
        result = field.metadata["read"](value, bounds)
    except ValueError as error:
        allowed = field.metadata["allowed"].format(**bounds.names())
        raise BadRequest(_refusal(name, value, str(error), allowed)) from None
    if not field.metadata["available"] and result != field.default:
        raise BadRequest(f"{name}: {shown(value)}: not available yet; leave it out")
    return result


def _refusal(name: str, value: object, detail: str, allowed: str) -> str:
    return f"{name}: {shown(value)} is not allowed{f' ({detail})' if detail else ''}; give {allowed}"


def _unknown(key: str, other_names: Iterable[str]) -> str:
    known = sorted([*_FIELDS, CARRIER, *other_names])
    near = difflib.get_close_matches(str(key)[:80], known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown option {shown(key)}{hint} Known options: {', '.join(known)}"
