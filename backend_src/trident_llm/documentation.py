"""The documents' tables, made from the code: settings, request options, errors, metrics.

``python -m trident_llm.documentation README.md docs/observability.md`` writes them between their markers; a test
compares them.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import errors
from .config import EngineConfig, allowed_values
from .metrics_catalog import METRICS
from .options import options_table

_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def settings_table() -> str:
    """Every setting that can be set today, in Markdown, and the names of those that cannot."""
    fields = dataclasses.fields(EngineConfig)
    rows = [
        (f"`{field.name}`", _type(field), _default(field.default), allowed_values(field), field.metadata["doc"])
        for field in fields
        if field.metadata["available"]
    ]
    later = ", ".join(f"`{field.name}`" for field in fields if not field.metadata["available"])
    return _table(("setting", "type", "default", "allowed", "meaning"), rows) + (
        f"\nNot available yet, and refused by name when set: {later}.\n"
    )


def errors_table() -> str:
    """The errors of ``trident_llm.errors``, in Markdown."""
    rows = [
        (f"`{cls.code}`", f"`{cls.__name__}`", " ".join((cls.__doc__ or "").split()))
        for cls in errors.TridentError.__subclasses__()
    ]
    return _table(("code", "class", "meaning"), rows)


def metrics_table() -> str:
    """The metrics of ``trident_llm.metrics_catalog``, in Markdown."""
    rows = [
        (f"`{spec.full_name}`", spec.kind + (f", by `{spec.label}`" if spec.label else ""), spec.unit, spec.meaning)
        for spec in METRICS
    ]
    return _table(("metric", "kind", "unit", "meaning"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "options": options_table,
    "errors": errors_table,
    "metrics": metrics_table,
}


def with_tables(text: str) -> str:
    """``text`` with what lies between ``<!-- table: NAME -->`` and ``<!-- end of table -->`` made anew."""
    return _MARKED.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _type(field: dataclasses.Field[Any]) -> str:
    return str(field.type).removesuffix(" | None")


def _default(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value in (None, "") else str(value)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(with_tables(path.read_text()))
