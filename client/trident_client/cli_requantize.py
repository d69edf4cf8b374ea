"""``trident requantize``, ``calibrate`` and ``jobs``: other weights under a running server, and how that stands."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from .cli_options import add_isq_settings
from .cli_output import MakeCommand, print_answer, table
from .client import TridentClient
from .deadline import Deadline
from .errors import BadRequest, TimedOut, parse_error

_POLL_SECONDS = 0.5
_UNFINISHED = "the job did not end within the timeout; it goes on"
_COLUMNS = ("id", "command", "state", "seconds", "progress", "error")


def add_requantize_commands(commands: Any, make: MakeCommand) -> None:
    """Add ``requantize``, ``calibrate start | stop | apply`` and ``jobs`` to the subcommands of a parser."""
    requantize = make(commands, "requantize", "give a running server weights of other isq settings", _requantize)
    meaning = "calibrate quantized weights on requests that allow it"
    group = commands.add_parser("calibrate", help=meaning, description=meaning, allow_abbrev=False)
    actions = group.add_subparsers(required=True, metavar="ACTION")
    start = make(actions, "start", "keep tokens of requests that have the option calibration, in memory", _start)
    start.add_argument("--max-samples", type=int, metavar="NUMBER", help="requests to keep, evenly chosen (1024)")
    start.add_argument("--max-length", type=int, metavar="NUMBER", help="tokens to keep of each (2048)")
    stop = make(actions, "stop", "keep no more; what there is stays for apply", _stop)
    apply = make(actions, "apply", "requantize, calibrated on what was kept, and forget it", _apply)
    jobs = make(commands, "jobs", "print the jobs that have changed weights, or are about to", _jobs)
    for parser in (requantize, apply):
        add_isq_settings(parser, "a setting isq_...; may be repeated; without a value its default")
        parser.add_argument("--no-wait", action="store_true", help="print the job and leave; the server goes on")
    for parser in (requantize, start, stop, apply, jobs):
        parser.add_argument("--json", action="store_true", help="print the answer as JSON")
        parser.add_argument("--admin-token", default="", metavar="TEXT", help="the server's admin_token, if it has one")


def _requantize(client: TridentClient, arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    if not settings:
        raise BadRequest("no settings are given; give --method, --bits, --group-size or --set isq_...=VALUE")
    return _follow(client, arguments, lambda timeout: client.requantize(settings, timeout=timeout))


def _apply(client: TridentClient, arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    given = {"settings": settings} if settings else {}
    return _follow(client, arguments, lambda timeout: client.calibrate("apply", timeout=timeout, **given))


def _start(client: TridentClient, arguments: argparse.Namespace) -> int:
    limits = {"max_samples": arguments.max_samples, "max_length": arguments.max_length}
    given = {name: value for name, value in limits.items() if value is not None}
    started = client.calibrate("start", timeout=arguments.timeout, **given)
    return print_answer(started, arguments, "collecting tokens of requests with the option calibration")


def _stop(client: TridentClient, arguments: argparse.Namespace) -> int:
    kept = client.calibrate("stop", timeout=arguments.timeout)
    text = f"{kept['tokens']} tokens kept, of {kept['samples']} of {kept['requests']} requests"
    return print_answer(kept, arguments, text)


def _jobs(client: TridentClient, arguments: argparse.Namespace) -> int:
    listed = client.jobs(timeout=arguments.timeout)
    return print_answer({"jobs": listed}, arguments, table(_COLUMNS, listed))


def _settings(arguments: argparse.Namespace) -> dict[str, str]:
    short = {"isq_method": arguments.method, "isq_bits": arguments.bits, "isq_group_size": arguments.group_size}
    return {**{name: value for name, value in short.items() if value is not None}, **dict(arguments.set)}


def _follow(
    client: TridentClient, arguments: argparse.Namespace, begin: Callable[[float | None], dict[str, Any]]
) -> int:
    """Begin a job and print what it does to standard error, until it ends. Raises its error."""
    deadline = Deadline.after(arguments.timeout)
    job, told = begin(deadline.remaining()), ""
    if arguments.no_wait:
        return print_answer(job, arguments, f"job {job['id']}; trident jobs tells how it stands")
    print(f"job {job['id']}", file=sys.stderr)
    while job["state"] == "running":
        if job["progress"] != told:
            told = job["progress"]
            print(told, file=sys.stderr, flush=True)
        time.sleep(deadline.cut(_POLL_SECONDS, _UNFINISHED))
        try:
            job = client.job(job["id"], timeout=deadline.left())
        except TimedOut:
            raise TimedOut(_UNFINISHED) from None
    if job["state"] == "failed":
        raise parse_error(job["error"])
    return print_answer(job, arguments, f"done in {job['seconds']:.1f} s: {job['progress']}")
