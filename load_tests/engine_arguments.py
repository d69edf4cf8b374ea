"""The command-line arguments that benchmarks of an engine in this process share."""

from __future__ import annotations

import argparse
from pathlib import Path

from results_file import RESULTS


def engine_parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """``description``: the module's docstring. ``out``: the results file in load_tests/results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True, help="the model's name in the results")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any engine setting")
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    return parser


def engine_settings(args: argparse.Namespace) -> dict[str, str]:
    """What ``--set`` asked for."""
    return dict(item.split("=", 1) for item in args.set)
