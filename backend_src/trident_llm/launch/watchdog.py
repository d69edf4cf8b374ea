"""Clears a launch when its launcher is gone, whatever ended it: ``python -m trident_llm.launch.watchdog FOLDER``.

It waits for the end of its standard input, which only the launcher holds open.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from .run_folder import RUN_VARIABLE, RunFolder


class Watchdog:
    """A watchdog process of the calling launcher."""

    def __init__(self, run: RunFolder) -> None:
        environment = {key: value for key, value in os.environ.items() if key != RUN_VARIABLE}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(run.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )

    def release(self) -> None:
        """End the watchdog, after the launch has been cleared."""
        self._process.kill()
        self._process.communicate()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    RunFolder(Path(sys.argv[1])).clear()


if __name__ == "__main__":
    main()
