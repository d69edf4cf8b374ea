"""The command ``trident``: generate, chat, stats, adapters, xlora, requantize, calibrate, jobs with a running server;
quantize and estimate without one."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from typing import Any

from .chat import Chat
from .cli_adapters import add_adapter_commands
from .cli_openai import add_openai_command
from .cli_options import add_options, given_options
from .cli_requantize import add_requantize_commands
from .cli_top import add_top_command
from .cli_weights import add_weights_commands
from .cli_xlora import add_xlora_command
from .client import TridentClient
from .errors import BadRequest, Overloaded, TridentError
from .results import Completion

EXIT_FAILED = 1
EXIT_BAD_REQUEST = 2
EXIT_UNAVAILABLE = 3
EXIT_BROKEN_PIPE = 128 + 13
EXIT_INTERRUPTED = 128 + 2
_EXIT_CODES = (
    "exit codes: 0 done, 1 the request failed, 2 it is not allowed, 3 no server or no room there, 130 interrupted"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors go to standard error as one line."""
    arguments = _parser().parse_args(argv)
    _never_fail_on_text()
    try:
        if hasattr(arguments, "run_locally"):
            return int(arguments.run_locally(arguments))
        with TridentClient(arguments.url, arguments.model, admin_token=arguments.admin_token) as client:
            code: int = arguments.run(client, arguments)
        return code
    except TridentError as error:
        print(f"trident: error: {error}", file=sys.stderr)
        return _exit_code(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left: nothing may be written to it any more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def _never_fail_on_text() -> None:
    """What a terminal cannot show is replaced; input that is no UTF-8 reaches the client, which refuses it by name."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trident", description=__doc__, epilog=_EXIT_CODES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = _command(commands, "generate", "continue a prompt", _generate)
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    generate.add_argument("--no-stream", action="store_true", help="print the whole answer at once")
    generate.add_argument("--n", type=int, default=1, metavar="NUMBER", help="answers to the same prompt")
    generate.add_argument("--json", action="store_true", help="print the whole answer, with all that is known, as JSON")
    generate.add_argument("--usage", action="store_true", help="print counts and speed to standard error")
    add_options(generate)
    chat = _command(commands, "chat", "talk with the model", _chat)
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    add_options(chat)
    stats = _command(commands, "stats", "print the engine's statistics", _stats)
    stats.add_argument("--json", action="store_true", help="print them as JSON")
    stats.add_argument("--admin-token", default="", metavar="TEXT", help="the server's admin_token, where it has one")
    add_adapter_commands(commands, _command)
    add_xlora_command(commands, _command)
    add_top_command(commands, _command)
    add_requantize_commands(commands, _command)
    add_weights_commands(commands, _EXIT_CODES)
    add_openai_command(commands, _EXIT_CODES)
    return parser


def _command(commands: Any, name: str, meaning: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=meaning, description=meaning, epilog=_EXIT_CODES, allow_abbrev=False
    )
    parser.add_argument("--url", default="localhost:8001", help="host:port of the gRPC endpoint (%(default)s)")
    parser.add_argument("--model", default="llm", help="the main door, iterative sequence batching (%(default)s)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this time (never)")
    parser.set_defaults(run=run, admin_token="")
    return parser


def _generate(client: TridentClient, arguments: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    options = given_options(arguments)
    whole = arguments.no_stream or arguments.json or arguments.n > 1
    start = time.monotonic()
    if not whole:
        chunks = []
        with closing(client.generate(prompt, timeout=arguments.timeout, n=arguments.n, **options)) as answer:
            for chunk in answer:
                chunks.append(chunk)
                print(chunk.text, end="", flush=True)
        print(flush=True)
        completion = Completion.from_chunks(chunks)
    else:
        completion = client.generate(prompt, stream=False, timeout=arguments.timeout, n=arguments.n, **options)
        _print_completion(completion, as_json=arguments.json)
    if arguments.usage:
        _print_usage(completion, time.monotonic() - start)
    return 0


def _print_completion(completion: Completion, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(completion), ensure_ascii=False, indent=2), flush=True)
    elif len(completion.samples) == 1:
        print(completion.text, flush=True)
    else:
        for number, sample in enumerate(completion.samples, start=1):
            print(f"[{number}] {sample.text}", flush=True)


def _print_usage(completion: Completion, seconds: float) -> None:
    output = sum(sample.num_output_tokens or 0 for sample in completion.samples)
    reasons = ", ".join(str(sample.finish_reason) for sample in completion.samples)
    print(
        f"{completion.num_input_tokens} input tokens, {output} output tokens in {seconds:.2f} s "
        f"({output / seconds:.1f} tokens/s), finish reason: {reasons}",
        file=sys.stderr,
    )


def _chat(client: TridentClient, arguments: argparse.Namespace) -> int:
    with suppress(ImportError):
        importlib.import_module("readline")  # gives input() its line editing and history
    chat = Chat(client, given_options(arguments), system=arguments.system, timeout=arguments.timeout)
    chat.run()
    return 0 if chat.failure is None else _exit_code(chat.failure)


def _stats(client: TridentClient, arguments: argparse.Namespace) -> int:
    stats = client.admin("stats", timeout=arguments.timeout)
    print(json.dumps(stats, indent=2) if arguments.json else stats_table(stats), flush=True)
    return 0


def stats_table(stats: Mapping[str, Any]) -> str:
    """Names and values in two columns; groups of values under a heading of their own."""
    plain = {name: value for name, value in stats.items() if not isinstance(value, Mapping)}
    width = max((len(name) for name in plain), default=0)
    lines = [f"{name:<{width}}  {_cell(value)}" for name, value in plain.items()]
    for name, group in stats.items():
        if isinstance(group, Mapping):
            lines += ["", name, *("  " + line for line in stats_table(group).splitlines())]
    return "\n".join(lines).strip("\n")


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _exit_code(error: TridentError) -> int:
    if isinstance(error, BadRequest):
        return EXIT_BAD_REQUEST
    return EXIT_UNAVAILABLE if isinstance(error, Overloaded) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
