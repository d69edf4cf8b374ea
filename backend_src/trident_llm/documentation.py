"""The documents' tables, made from the code: settings, request options, errors, metrics.

``python -m trident_llm.documentation README.md docs/observability.md`` writes them between their markers; a test
compares them.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import errors
from .config import EngineConfig, allowed_values
from .metrics_catalog import METRICS
from .option_values import BOUND_NAMES
from .options import CARRIER, CARRIER_ALLOWED, RequestOptions

_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class OptionDoc:
    """An option of requests in words."""

    name: str
    kind: str
    default: str
    allowed: str
    meaning: str


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


def option_docs() -> tuple[OptionDoc, ...]:
    """All options, in the order of the README."""
    names = {bound: bound for bound in BOUND_NAMES}
    rows = [
        OptionDoc(
            name=field.name,
            kind=field.metadata["kind"],
            default=_default(field.default),
            allowed=field.metadata["allowed"].format(**names),
            meaning=field.metadata["meaning"] + ("" if field.metadata["available"] else " (not available yet)"),
        )
        for field in dataclasses.fields(RequestOptions)
    ]
    meaning = "options in one string; explicit ones win, on llm_vllm only those that are inputs"
    return (*rows, OptionDoc(CARRIER, "JSON", "", CARRIER_ALLOWED, meaning))


def options_table() -> str:
    """The options of requests, in Markdown."""
    rows = [(f"`{doc.name}`", doc.kind, doc.default, doc.allowed, doc.meaning) for doc in option_docs()]
    return _table(("option", "type", "default", "allowed", "meaning"), rows)


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
    return "" if value in (None, (), "") else str(value)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(with_tables(path.read_text()))
