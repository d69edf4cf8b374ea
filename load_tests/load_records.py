"""What a load run's users saw, on its way from their processes to the files of the run's folder, and back from them.

``requests.csv`` has a line for each request, ``tokens.csv`` the output tokens that arrived in each second.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

REQUESTS, TOKENS, MOMENTS = "requests.csv", "tokens.csv", "moments.json"
"""Files of a run's folder that come from locust. ``MOMENTS``: when all users had started, and were told to end."""
SERVER, RUN = "server.csv", "run.json"
"""Those of run_load.py: the engine's statistics by the second, and what is known of the run as a whole."""


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One request. Times in milliseconds; None: there was no such thing."""

    kind: str
    """Of its user."""
    ended: float
    """Seconds of the wall clock."""
    time_to_first_token: float | None = None
    time_between_tokens: float | None = None
    longest_gap: float | None = None
    request: float | None = None
    cancelled: float | None = None
    refusal: float | None = None
    output_tokens: int = 0
    error: str = ""
    """Why it failed; empty when it did not."""


COLUMNS = tuple(field.name for field in fields(RequestRecord))


class Recorder:
    """Keeps records of one process until they are fetched."""

    def __init__(self) -> None:
        self._requests: list[tuple[Any, ...]] = []
        self._tokens: Counter[int] = Counter()

    def add(self, record: RequestRecord) -> None:
        self._requests.append(astuple(record))

    def add_tokens(self, at: float, count: int) -> None:
        """``count`` output tokens arrived at ``at`` (wall clock)."""
        self._tokens[int(at)] += count

    def drain(self) -> dict[str, list[Any]]:
        """All since the last call, as plain lists."""
        drained = {"requests": self._requests, "tokens": [list(item) for item in self._tokens.items()]}
        self._requests, self._tokens = [], Counter()
        return drained


class RecordFiles:
    """Writes what recorders drained into ``folder``. Use it in a ``with`` statement, or close it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / REQUESTS).open("w", newline="")
        self._rows = csv.writer(self._file)
        self._rows.writerow(COLUMNS)
        self._tokens: Counter[int] = Counter()

    def __enter__(self) -> RecordFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def write(self, drained: Mapping[str, list[Any]]) -> None:
        for values in drained["requests"]:
            self._rows.writerow(["" if value is None else value for value in values])
        for second, count in drained["tokens"]:
            self._tokens[second] += count

    def close(self) -> None:
        self._file.close()
        with (self._folder / TOKENS).open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("second", "tokens"))
            rows.writerows(sorted(self._tokens.items()))


def read_requests(folder: Path) -> list[RequestRecord]:
    with (folder / REQUESTS).open(newline="") as file:
        return [_record(row) for row in csv.DictReader(file)]


def read_tokens(folder: Path) -> dict[int, int]:
    """Output tokens by second of the wall clock."""
    with (folder / TOKENS).open(newline="") as file:
        return {int(row["second"]): int(row["tokens"]) for row in csv.DictReader(file)}


def _record(row: Mapping[str, str]) -> RequestRecord:
    texts = ("kind", "error")
    values: dict[str, Any] = {name: row[name] for name in texts}
    values |= {name: float(row[name]) if row[name] else None for name in COLUMNS if name not in texts}
    return RequestRecord(**{**values, "output_tokens": int(values["output_tokens"])})
