"""The line that tells a waiting person how far the start is."""

from __future__ import annotations

import time
from typing import TextIO

from ..run_directory import RunDirectory
from .run_folder import RunFolder


class ProgressLine:
    """On a terminal one line that is written over; elsewhere one line per change."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._started = time.monotonic()
        self._shown = ""

    @property
    def seconds(self) -> float:
        """Seconds since the line was made."""
        return time.monotonic() - self._started

    def show(self, text: str) -> None:
        if self._is_terminal:
            self._stream.write(f"\r\033[K{text} ({self.seconds:.0f} s)")
        elif text != self._shown:
            self._stream.write(f"{text}\n")
        self._shown = text
        self._stream.flush()

    def end(self) -> None:
        """Wipe the line from a terminal."""
        if self._is_terminal and self._shown:
            self._stream.write("\r\033[K")
            self._stream.flush()


def loading_text(run: RunFolder) -> str:
    """What the launch is doing before it is ready, from the status its engine writes."""
    for folder in sorted(run.path.glob("[0-9]*-*")):
        status = RunDirectory(folder).read_status()
        if status is not None and status.state == "loading":
            return status.progress or "loading the model"
        if status is not None and status.state == "ready":
            return "starting the doors"
    return "starting the Triton server"
