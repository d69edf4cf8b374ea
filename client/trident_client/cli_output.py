"""What the commands of the command line share: how they are made, and how they print answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MakeCommand = Callable[[Any, str, str, Any], argparse.ArgumentParser]
"""Commands, name, meaning, and what runs it."""


def print_answer(answer: Mapping[str, Any], arguments: argparse.Namespace, text: str) -> int:
    """``text``, or the answer itself where ``--json`` asks for it; the exit code."""
    print(json.dumps(answer, indent=2) if arguments.json else text, flush=True)
    return 0


def table(columns: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> str:
    """One line per entry under a line of headings; - stands for None."""
    rows = [tuple(columns), *(tuple(_cell(entry[column]) for column in columns) for entry in entries)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)
