"""``trident adapters``: load, unload and list the LoRA adapters and X-LoRA mixes of a running server."""

from __future__ import annotations

import argparse
from typing import Any

from .cli_output import MakeCommand, print_answer, table
from .client import TridentClient

_COLUMNS = ("name", "generation", "rank", "modules", "bytes", "slot", "users", "source")


def add_adapter_commands(commands: Any, make: MakeCommand) -> None:
    """Add ``adapters load | unload | list`` to the subcommands of a parser."""
    meaning = "load, unload and list LoRA adapters"
    group = commands.add_parser("adapters", help=meaning, description=meaning, allow_abbrev=False)
    actions = group.add_subparsers(required=True, metavar="ACTION")
    load = make(actions, "load", "load an adapter, or put it in the place of the one that has its name", _load)
    load.add_argument("name", metavar="NAME", help="what requests will call it")
    load.add_argument("path", metavar="PATH", help="a folder below the server's adapter_root, or a Hugging Face id")
    load.add_argument("--pinned", action="store_true", help="the last to leave the device when it is not in use")
    mix = make(actions, "load-xlora", "load an X-LoRA mix with its members", _load_xlora)
    mix.add_argument("path", metavar="PATH", help="a folder below the server's adapter_root, or a Hugging Face id")
    mix.add_argument("--name", default="xlora", help="requests use the one named %(default)s by themselves")
    unload = make(actions, "unload", "take an adapter's name away; requests that run with it keep it", _unload)
    unload.add_argument("name", metavar="NAME")
    shown = make(actions, "list", "print the loaded adapters", _list)
    for parser in (load, mix, unload, shown):
        parser.add_argument("--json", action="store_true", help="print the answer as JSON")
        parser.add_argument("--admin-token", default="", metavar="TEXT", help="the server's admin_token, if it has one")


def _load(client: TridentClient, arguments: argparse.Namespace) -> int:
    loaded = client.load_adapter(arguments.name, arguments.path, pinned=arguments.pinned, timeout=arguments.timeout)
    return print_answer(loaded, arguments, f"loaded {loaded['name']}, generation {loaded['generation']}")


def _load_xlora(client: TridentClient, arguments: argparse.Namespace) -> int:
    loaded = client.load_xlora(arguments.path, name=arguments.name, timeout=arguments.timeout)
    members = ", ".join(loaded["adapters"])
    text = f"loaded {loaded['name']}, generation {loaded['generation']}, a mix of {members}"
    return print_answer(loaded, arguments, text)


def _unload(client: TridentClient, arguments: argparse.Namespace) -> int:
    gone = client.unload_adapter(arguments.name, timeout=arguments.timeout)
    return print_answer(gone, arguments, f"unloaded {gone['name']}; {gone['users']} running requests still use it")


def _list(client: TridentClient, arguments: argparse.Namespace) -> int:
    listed = client.list_adapters(timeout=arguments.timeout)
    mixes = [f"mix {mix['name']}: {', '.join(mix['adapters'])}" for mix in listed["mixes"]]
    return print_answer(listed, arguments, "\n".join([table(_COLUMNS, listed["adapters"]), *mixes]))
