"""Request options and settings as arguments of the command line. Which values they take is the server's to say."""

from __future__ import annotations

import argparse
from typing import Any

_NUMBERS = {
    "max_tokens": "most output tokens",
    "min_tokens": "output tokens before the answer may end",
    "temperature": "0: the most likely token; higher: more random",
    "top_p": "sample from the most likely tokens that together have this probability",
    "top_k": "sample from this many most likely tokens",
    "min_p": "drop tokens less likely than this share of the most likely one's probability",
    "seed": "equal seeds give equal answers",
    "presence_penalty": "on tokens that the output has",
    "frequency_penalty": "on tokens, times how often the output has them",
    "repetition_penalty": "on tokens that prompt or output have",
    "xlora_top_k": "adapters of the mix per token and module",
    "xlora_temperature": "of the mix's softmax",
    "logprobs": "log-probabilities of this many most likely tokens at each position",
    "request_priority": "lower runs first",
}
_TEXTS = {
    "stop_token_ids": "token ids that end the answer, as a JSON list",
    "logit_bias": "token id to bias, as a JSON object",
    "adapter": "answer with this LoRA adapter, or with a blend: NAME:WEIGHT,NAME:WEIGHT",
    "user": "whose request it is; users share a full engine",
    "cache_salt": "share cached prefixes only with requests of the same salt",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the request options; each that is given lands in the namespace under its own name."""
    group = parser.add_argument_group("request options", "defaults and limits are the server's")
    for name, meaning in _NUMBERS.items():
        _add(group, name, type=_number, metavar="NUMBER", help=meaning)
    for name, meaning in _TEXTS.items():
        _add(group, name, metavar="TEXT", help=meaning)
    _add(group, "stop", action="append", metavar="TEXT", help="text that ends the answer; may be repeated")
    _add(group, "ignore_eos", action=argparse.BooleanOptionalAction, help="go on after the end of sequence")
    _add(group, "xlora", action=argparse.BooleanOptionalAction, help="answer with the server's X-LoRA mix")
    group.add_argument(
        "--option",
        action="append",
        type=assignment,
        default=[],
        metavar="NAME=VALUE",
        help="any other request option; may be repeated",
    )


def add_isq_settings(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Add ``--set``, which means ``meaning``, and short forms of the settings of quantization that are given most."""
    parser.add_argument("--method", metavar="NAME", help="short for --set isq_method=NAME")
    parser.add_argument("--bits", metavar="NUMBER", help="short for --set isq_bits=NUMBER")
    parser.add_argument("--group-size", metavar="SIZE", help="short for --set isq_group_size=SIZE")
    parser.add_argument("--set", action="append", type=assignment, default=[], metavar="NAME=VALUE", help=meaning)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The request options that were given."""
    names = [*_NUMBERS, *_TEXTS, "stop", "ignore_eos", "xlora"]
    options = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    return {**options, **dict(arguments.option)}


def _add(group: argparse._ArgumentGroup, name: str, **settings: Any) -> None:
    group.add_argument("--" + name.replace("_", "-"), dest=name, default=argparse.SUPPRESS, **settings)


def _number(text: str) -> int | float | str:
    """A number where ``text`` is one; other text travels as it is, for the server to refuse with its own words."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def assignment(text: str) -> tuple[str, str]:
    """NAME=VALUE as a pair; an argparse type."""
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name.strip().replace("-", "_"), value
