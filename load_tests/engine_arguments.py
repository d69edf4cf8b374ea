"""The command-line arguments that benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path

from results_file import RESULTS


def engine_parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """``description``: the module's docstring. ``out``: the results file in load_tests/results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True, help="the model's name in the results")
    add_settings(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add ``--set KEY=VALUE``, which may be repeated."""
    help = "any engine setting"
    parser.add_argument("--set", action="append", default=[], type=_setting, metavar="KEY=VALUE", help=help)


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return key, value


def engine_settings(args: argparse.Namespace) -> dict[str, str]:
    """What ``--set`` asked for."""
    return dict(args.set)


def positive(text: str) -> int:
    """An argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """An argparse type: names with commas between, all of them known."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return names

    return parse
