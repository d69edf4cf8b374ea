"""The engine process: loads the core, proves that it generates, and serves it to the doors until told to end.

Run as ``python -m trident_llm.engine.process --run-dir DIR --owner-pid PID``. It lives as long as its owner, the
server process. It knows neither the server nor text.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import os
import select
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ..config import EngineConfig
from ..errors import LoadFailed, TridentError
from ..logs import configure_logging
from ..process_memory import bound_onednn_caches, freeze_loaded_objects
from ..protocol import Delta, SamplingParams, Submit
from ..run_directory import EngineStatus, RunDirectory
from ..step_board import StepBoard
from .loop import Core, CoreFactory, EngineLoop
from .probation import Probation
from .transport import DoorSocket

logger = logging.getLogger(__name__)


class _StatusReporter:
    """Writes the process's state to the run directory, progress at most ten times a second."""

    def __init__(self, run_directory: RunDirectory) -> None:
        self._run_directory = run_directory
        self._last_progress = 0.0

    def progress(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last_progress >= 0.1:
            self._last_progress = now
            self._write(EngineStatus(state="loading", pid=os.getpid(), progress=text))

    def ready(self) -> None:
        self._write(EngineStatus(state="ready", pid=os.getpid()))

    def failed(self, error: TridentError) -> None:
        self._write(EngineStatus(state="failed", pid=os.getpid(), error=str(error)))

    def _write(self, status: EngineStatus) -> None:
        self._run_directory.write_status(status)


def _watch_owner(owner_pid: int, run_directory: RunDirectory) -> None:
    """Start a thread that ends this process, whatever it is doing, when its owner has gone."""

    def end() -> NoReturn:
        run_directory.remove()
        os._exit(0)

    try:
        owner = os.pidfd_open(owner_pid)
    except ProcessLookupError:
        end()

    def watch() -> None:
        select.select([owner], [], [])
        end()

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()


def _stop_on_sigterm(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def _load_core(config: EngineConfig, progress: Callable[[str], None], *, run_directory: RunDirectory) -> Core:
    """The core, with the weights that an engine before this one was given last, if they can still be had.

    The run directory outlives this process: one that takes its place finds adapters and settings there.
    """
    from .engine import EngineCore

    load = functools.partial(
        EngineCore, progress=progress, adapter_folder=run_directory.path / "adapters", journal=run_directory
    )
    requantized = run_directory.read_requantized()
    if requantized is not None:
        parameters = {**config.to_parameters(), **requantized.settings}
        try:
            return load(EngineConfig.from_parameters(parameters), kept_digest=requantized.samples_digest)
        except Exception:
            logger.exception("the weights of the last requantize cannot be loaded; loading those of the settings")
            run_directory.forget_requantized()
    return load(config)


def main(arguments: Sequence[str] | None = None, core_factory: CoreFactory | None = None) -> int:
    """Load the core and serve it. Returns the exit status: 0 asked to end, 1 the engine broke, 2 it did not load."""
    parser = argparse.ArgumentParser(prog="trident_llm.engine.process")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--owner-pid", type=int, required=True)
    options = parser.parse_args(arguments)
    configure_logging("engine")
    signal.signal(signal.SIGTERM, _stop_on_sigterm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    bound_onednn_caches()
    run_directory = RunDirectory(options.run_dir)
    _watch_owner(options.owner_pid, run_directory)
    status = _StatusReporter(run_directory)
    status.progress("starting")
    try:
        launch = run_directory.read_launch()
        if launch is None:
            raise LoadFailed(f"no launch settings in {str(run_directory.path)!r}")
        config = EngineConfig.from_parameters(launch.parameters)
        configure_logging("engine", config.log_format, config.log_level)
        load_core = core_factory or functools.partial(_load_core, run_directory=run_directory)
        core = load_core(config, status.progress)
        test_totals = _prove(core)
    except Exception as error:
        if not isinstance(error, TridentError):
            traceback.print_exc()
            error = LoadFailed(f"the engine could not be loaded: {type(error).__name__}: {error}")
        status.failed(error)
        return 2
    freeze_loaded_objects()
    return _serve(core, config, run_directory, status, test_totals)


def _prove(core: Core) -> dict[str, float]:
    """Generate a token, so that ready means what it says; returns by how much that has raised the core's totals.

    Raises ``LoadFailed`` when none comes, or no number.
    """
    before = core.stats()
    params = SamplingParams(seed=0, max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=0)
    core.add(Submit(request_id="readiness", prompt_ids=[0], params=params))
    deltas: list[Delta] = []
    while core.has_work():
        deltas += core.step()
    logprobs = [row.logprob for delta in deltas for row in delta.logprobs or ()]
    if len(logprobs) != 1 or not math.isfinite(logprobs[0]):
        raise LoadFailed(f"the test generation gave {logprobs or 'nothing'} instead of one token's log-probability")
    core.request_metrics.clear()
    return {name: value - before[name] for name, value in core.stats().items() if name.endswith("_total")}


def _serve(
    core: Core,
    config: EngineConfig,
    run_directory: RunDirectory,
    status: _StatusReporter,
    test_totals: Mapping[str, float],
) -> int:
    epoch = uuid.uuid4().hex
    run_directory.socket_path.unlink(missing_ok=True)
    socket = DoorSocket(run_directory.address, epoch)
    board = StepBoard(run_directory.board_path, config.max_num_seqs)
    probation = Probation(run_directory.read_deaths(), run_directory.write_deaths)
    try:
        status.ready()
        loop = EngineLoop(core, socket, epoch, board=board, probation=probation, test_totals=test_totals)
        loop.run()
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        core.close()
        socket.close()
        board.close()
    run_directory.remove()
    return 0


if __name__ == "__main__":
    sys.exit(main())
