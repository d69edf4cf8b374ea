"""The command-line arguments that benchmarks share."""

from __future__ import annotations

import argparse
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
