"""A door without a server, as a program: ``fake_door.py RUN_DIR OWNER_PID`` joins an engine and waits to be killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.fakes.engine_runs import fake_launch
from trident_llm.run_directory import RunDirectory
from trident_llm.server.engine_client import EngineClient


def main() -> None:
    run_directory, owner_pid = RunDirectory(Path(sys.argv[1])), int(sys.argv[2])
    client = EngineClient(run_directory, launch=fake_launch(Path(sys.argv[3])), owner_pid=owner_pid, log=print)
    client.start()
    while not client.is_watch_holder:
        time.sleep(0.01)
    print("holder", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
