"""``trident openai``: the OpenAI-compatible gateway, which the extra ``gateway`` installs."""

from __future__ import annotations

import argparse
import os
from typing import Any

from trident_gateway.affinity import LOAD_FACTOR
from trident_gateway.cores import MAX_DEFAULT_WORKERS, default_workers

from .errors import BadRequest


def add_openai_command(commands: Any, epilog: str) -> None:
    """Add ``openai`` to the subcommands of a parser."""
    meaning = "serve OpenAI's API before one or several servers"
    parser: argparse.ArgumentParser = commands.add_parser(
        "openai", help=meaning, description=meaning, epilog=epilog, allow_abbrev=False
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=9000, help="port to listen on (%(default)s)")
    parser.add_argument("--url", action="append", metavar="HOST:PORT",
                        help="gRPC endpoint of a server (localhost:8001), or dns:HOST:PORT for all addresses of a "
                        "name; may be repeated, or several with commas between")  # fmt: skip
    parser.add_argument("--api-key", default=os.environ.get("TRIDENT_API_KEY", ""), metavar="TEXT",
                        help="what clients must send; default: TRIDENT_API_KEY, or none")  # fmt: skip
    parser.add_argument("--admin-token", default=os.environ.get("TRIDENT_ADMIN_TOKEN", ""), metavar="TEXT",
                        help="the servers' admin_token, to list adapters; default: TRIDENT_ADMIN_TOKEN")  # fmt: skip
    parser.add_argument("--load-factor", type=float, default=LOAD_FACTOR, metavar="NUMBER",
                        help="a conversation's own server is passed over while it runs more than this times the mean "
                        "of all (%(default)s)")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="NUMBER",
                        help="processes that share the port, each of which can use one core; default: a quarter of the "
                        f"cores that it may use, from 1 to {MAX_DEFAULT_WORKERS}")  # fmt: skip
    parser.add_argument("--drain-timeout", type=int, default=5, metavar="SECONDS",
                        help="what requests that run may take to finish at the end (%(default)s)")  # fmt: skip
    parser.set_defaults(run_locally=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    try:
        from trident_gateway.command import Settings, serve
    except ImportError as error:
        raise BadRequest(f"openai: {error.name} is not installed: pip install 'trident-llm[gateway]'") from None
    settings = Settings(
        urls=arguments.url or ["localhost:8001"],
        api_key=arguments.api_key,
        admin_token=arguments.admin_token,
        load_factor=arguments.load_factor,
        drain_timeout=arguments.drain_timeout,
    )
    num_workers = default_workers() if arguments.workers is None else arguments.workers
    return serve(settings, arguments.host, arguments.port, num_workers)
