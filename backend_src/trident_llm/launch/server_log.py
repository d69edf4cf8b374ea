"""Reads the Triton server's log: the reason why a model did not load, and errors worth showing."""

from __future__ import annotations

import json
import re
from pathlib import Path

_LINE = re.compile(r"^(?P<level>[EWI])\d{4} [\d:.]+ +\d+ [\w.]+:\d+\] (?P<text>.*)$")
_LOAD_FAILED = re.compile(r"^failed to load '(?P<model>[^']+)' version -?\d+: (?P<reason>.+)", re.DOTALL)
_PREFIX = re.compile(
    r"^(?:(?:Unknown|Internal|Not found|Invalid argument|Unavailable|Unsupported|Already exists|Cancelled): )?"
    r"(?:TritonModelException: )?"
)
_NOISE = ("CudaDriverHelper has not been initialized",)
TAIL_LINES = 20


class ServerLog:
    """The log file of a running server, read from where the last call stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._rest = ""

    def new_errors(self) -> list[str]:
        """The texts of error lines written since the last call."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        self._offset += len(content)
        *lines, self._rest = (self._rest + content.decode(errors="replace")).split("\n")
        return [text for line in lines if (text := error_text(line)) is not None]

    def failure(self) -> str:
        """Why the server ended: the models' own error texts, else the last lines of the log."""
        lines = self.path.read_text(errors="replace").splitlines()
        reasons = [reason for line in lines if (reason := load_failure(error_text(line) or "")) is not None]
        return "\n".join(reasons or lines[-TAIL_LINES:]) or "its log is empty"


def error_text(line: str) -> str | None:
    """The text of an error line; None for any other line, and for errors that every start without a GPU logs."""
    match = _LINE.match(line)
    if match is None or match["level"] != "E":
        return None
    text = _unquoted(match["text"])
    return None if text.startswith(_NOISE) else text


def load_failure(text: str) -> str | None:
    """``MODEL: REASON`` if the error ``text`` says that a model did not load, without the place in the code."""
    match = _LOAD_FAILED.match(text)
    if match is None:
        return None
    reason = match["reason"].partition("\n\nAt:\n")[0]
    return f"{match['model']}: {_PREFIX.sub('', reason, count=1).strip()}"


def _unquoted(text: str) -> str:
    """Log texts are JSON strings since 2.46, and plain before."""
    if text.startswith('"'):
        try:
            return str(json.loads(text))
        except json.JSONDecodeError:
            return text.strip('"')
    return text
