"""Readers for the values of request options: from what JSON, strings and tensors carry to checked Python values.

A reader takes the raw value and the request's ``Bounds`` and raises ``ValueError``, with a text only when there is
more to say than that the value is not what the option allows. It does not know which option it reads for.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import msgspec

from .adapters.spec import parse_spec
from .protocol import Limits

MAX_STOP_CHARS = 1024
"""Longest stop string, in characters."""
MAX_LOGIT_BIASES = 1024
"""Most entries of ``logit_bias``."""
BOUND_NAMES = ("max_n", "max_stop_strings", "max_logprobs", "vocab_size")
_MAX_NAME_CHARS = 1024
_INTEGER = re.compile(r"[+-]?[0-9]{1,40}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 78


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the model and its settings allow a request to ask for."""

    limits: Limits
    vocab_size: int

    def names(self) -> dict[str, int]:
        """The values behind ``BOUND_NAMES``, which readers and the texts of what an option allows refer to."""
        values = {**msgspec.structs.asdict(self.limits), "vocab_size": self.vocab_size}
        return {name: values[name] for name in BOUND_NAMES}


Reader = Callable[[object, Bounds], Any]
Bound = float | str | None
"""A number, or the name of a field of ``Bounds.names()``; None: no bound."""


def shown(value: object) -> str:
    """``value`` for an error text, at most about 80 characters."""
    try:
        return _SHOWN.repr(value)[:80]
    except ValueError:
        return "a number of thousands of digits"


def read_integer(value: object) -> int:
    """An integer of at most 64 bits from a whole number or its decimal text; never from a bool."""
    if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
        result = int(value)
    else:
        whole = value if isinstance(value, Integral) and not isinstance(value, bool) else read_number(value)
        result = int(whole)
        if result != whole:
            raise ValueError
    if not -(2**63) <= result < 2**64:
        raise ValueError("more than 64 bits")
    return result


def read_number(value: object) -> float:
    """A finite float from a number or its decimal text; never from a bool."""
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            raise ValueError
        number = float(value)
    elif isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            raise ValueError from None
    else:
        raise ValueError
    if not math.isfinite(number):
        raise ValueError
    return number


def integer(low: Bound = None, high: Bound = None) -> Reader:
    """A reader for integers from ``low`` to ``high``, both included."""

    def read(value: object, bounds: Bounds) -> int:
        number = read_integer(value)
        _check_range(number, low, high, bounds)
        return number

    return read


def number(low: Bound = None, high: Bound = None, *, above: float | None = None) -> Reader:
    """A reader for numbers from ``low`` to ``high``, both included, and greater than ``above``."""

    def read(value: object, bounds: Bounds) -> float:
        result = read_number(value)
        _check_range(result, low, high, bounds)
        if above is not None and result <= above:
            raise ValueError
        return result

    return read


def boolean(value: object, bounds: Bounds) -> bool:
    """True or false; as text ``true``, ``false``, ``1`` or ``0``; as a number 1 or 0."""
    text = value.strip().lower() if isinstance(value, str) else value
    if text in ("true", "1") or (isinstance(text, Integral) and text == 1):
        return True
    if text in ("false", "0") or (isinstance(text, Integral) and text == 0):
        return False
    raise ValueError


def name(value: object, bounds: Bounds) -> str:
    """A short string that UTF-8 can carry."""
    text = _text(value)
    if len(text) > _MAX_NAME_CHARS:
        raise ValueError(f"{len(text)} characters")
    return text


def adapter_spec(value: object, bounds: Bounds) -> str:
    """The name of an adapter or a blend of several; whether they are loaded is the engine's business."""
    text = name(value, bounds)
    parse_spec(text)
    return text


def seed_value(value: object, bounds: Bounds) -> int | None:
    """A seed of 64 bits, signed or not; -1 means none, as in vLLM."""
    seed: int = integer(-(2**63), 2**64 - 1)(value, bounds)
    return None if seed == -1 else seed


def logprobs_count(value: object, bounds: Bounds) -> int | None:
    """How many logprobs; OpenAI clients send false for none and true for one, as vLLM takes it."""
    if isinstance(value, bool):
        value = 1 if value else None
    return None if value is None else integer(0, "max_logprobs")(value, bounds)


def stop_strings(value: object, bounds: Bounds) -> tuple[str, ...]:
    """Stop strings from one plain string, a list, or a JSON list in a string; duplicates dropped."""
    listed = _list_in(value)
    strings = [value] if listed is None else listed
    _check_count(strings, bounds)
    for string in map(_text, strings):
        if not string:
            raise ValueError("an empty stop string")
        if len(string) > MAX_STOP_CHARS:
            raise ValueError(f"a stop string of {len(string)} characters")
    return tuple(dict.fromkeys(strings))


def token_ids(value: object, bounds: Bounds) -> tuple[int, ...]:
    """Token ids from a list, a JSON list in a string, or a single id; duplicates dropped."""
    listed = _list_in(value)
    ids = [value] if listed is None else listed
    _check_count(ids, bounds)
    return tuple(dict.fromkeys(_token_id(item, bounds) for item in ids))


def logit_biases(value: object, bounds: Bounds) -> dict[int, float]:
    """Token id -> bias from a mapping, or from a JSON object in a string."""
    pairs = read_json(value) if isinstance(value, str) else value
    if not isinstance(pairs, dict):
        raise ValueError
    if len(pairs) > MAX_LOGIT_BIASES:
        raise ValueError(f"{len(pairs)} entries")
    biases = {}
    for key, bias in pairs.items():
        try:
            biases[_token_id(key, bounds)] = number(-100, 100)(bias, bounds)
        except ValueError as error:
            raise ValueError(str(error) or f"the bias of {shown(key)} is {shown(bias)}") from None
    return biases


def chat_messages(value: object, bounds: Bounds) -> str | Sequence[Any]:
    """Messages as JSON text, or as a list; what is in them is checked when they are rendered."""
    if not isinstance(value, (str, list, tuple)):
        raise ValueError
    return value


def read_json(text: str) -> Any:
    """Parsed JSON. Raises ``ValueError`` that says where the text stops being JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _check_range(value: float, low: Bound, high: Bound, bounds: Bounds) -> None:
    names = bounds.names()
    least = names[low] if isinstance(low, str) else low
    most = names[high] if isinstance(high, str) else high
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError


def _check_count(values: list[Any], bounds: Bounds) -> None:
    if len(values) > bounds.limits.max_stop_strings:
        raise ValueError(f"{len(values)} of them")


def _list_in(value: object) -> list[Any] | None:
    """The list that ``value`` is, or that it spells in JSON; None when it is anything else."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return None
        return parsed if isinstance(parsed, list) else None
    return None


def _token_id(value: object, bounds: Bounds) -> int:
    token_id = read_integer(value)
    if not 0 <= token_id < bounds.vocab_size:
        raise ValueError(f"token id {shown(token_id)} is outside the vocabulary")
    return token_id


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"unpaired surrogate at character {error.start}") from None
    return value
