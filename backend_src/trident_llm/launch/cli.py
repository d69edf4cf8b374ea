"""The launcher's main line: check, start, wait, answer a sample prompt, serve until told to end, leave nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from ..errors import TridentError
from .options import Options, model_names, parse_options
from .ports import Ports, hold_ports
from .progress import ProgressLine, loading_text
from .repository import copy_repository
from .run_folder import RunFolder, new_run_folder, remove_stale
from .sample import answer_sample
from .server_home import find_server
from .server_process import DEFAULT_DRAIN_TIMEOUT, ServerProcess, server_command, server_environment
from .watchdog import Watchdog

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ENGINE_EXIT_SECONDS = 0.4


class _Stop(BaseException):
    """A signal asked the launcher to end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when told to end, 1 when the server could not start or broke, 2 for bad options."""
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
    except TridentError as error:
        return _fail(error, 2)
    for number in _SIGNALS:
        # nohup has a hangup ignored, and wants that to stay.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        _serve(options)
    except TridentError as error:
        return _fail(error, 2 if error.code == "INVALID_ARG" else 1)
    except (_Stop, BrokenPipeError):
        return 0


def _serve(options: Options) -> NoReturn:
    with hold_ports(options) as ports:
        for stale in remove_stale():
            print(f"Removed what an earlier run left behind: {stale.path}")
        _run(options, ports)


def _run(options: Options, ports: Ports) -> NoReturn:
    with new_run_folder() as run, contextlib.ExitStack() as at_end:
        at_end.callback(Watchdog(run).release)
        at_end.callback(run.clear, grace=_ENGINE_EXIT_SECONDS)
        # Whatever ends this block, a signal must not interrupt the clearing.
        at_end.callback(_ignore_signals)
        server = _start(options, ports, run)
        at_end.callback(server.stop)
        at_end.callback(_ignore_signals)
        _wait(server, run)
        if options.sample and "llm" in (options.only or model_names(options.repository)):
            answer_sample(f"{options.connect_host}:{ports.grpc}", sys.stdout)
        _print_endpoints(options, ports)
        while True:
            server.check()
            for text in server.log.new_errors():
                print(f"server: {text}", file=sys.stderr, flush=True)
            time.sleep(0.5)


def _start(options: Options, ports: Ports, run: RunFolder) -> ServerProcess:
    engine = copy_repository(options, run.models)
    home = find_server(os.environ, run.backends)
    drain_timeout = engine.drain_timeout if engine is not None else DEFAULT_DRAIN_TIMEOUT
    return ServerProcess(
        server_command(home, options, ports, run, drain_timeout),
        server_environment(os.environ, home, run, engine.admin_token if engine is not None else ""),
        (options.connect_host, ports.http),
        options.log or run.log,
        drain_timeout,
    )


def _wait(server: ServerProcess, run: RunFolder) -> None:
    line = ProgressLine(sys.stdout)
    try:
        server.wait_until_ready(lambda: line.show(loading_text(run)))
    finally:
        line.end()
    run.ready.touch()
    print(f"Trident is ready after {line.seconds:.1f} s.", flush=True)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    _ignore_signals()
    raise _Stop


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _print_endpoints(options: Options, ports: Ports) -> None:
    host = options.connect_host
    print(
        f"\n  HTTP     http://{host}:{ports.http}\n"
        f"  gRPC     {host}:{ports.grpc}\n"
        f"  metrics  http://{host}:{ports.metrics}/metrics\n\n"
        f"Try:\n  curl -s http://{host}:{ports.http}/v2/models/llm/generate "
        """-d '{"text_input": "The capital of France is", "max_tokens": 16, "temperature": 0}'\n\n"""
        "Ctrl-C ends it.",
        flush=True,
    )


def _fail(error: TridentError, code: int) -> int:
    print(f"scripts/serve: {error}", file=sys.stderr, flush=True)
    return code
