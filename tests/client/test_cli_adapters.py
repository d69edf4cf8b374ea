"""The command line's adapters, against a fake server."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.fakes.fake_triton import FakeTriton
from trident_client import AsyncTridentClient, TridentClient
from trident_client.cli import main
from trident_client.results import Chunk, Completion

POET = {
    "name": "poet", "generation": 3, "rank": 16, "modules": 224, "bytes": 84000000, "slot": None, "users": 2,
    "source": "poets/poet",
}  # fmt: skip
COMMANDS = ("load_adapter", "unload_adapter", "list_adapters")
MIX = {"name": "m", "generation": 7, "adapters": ["poet", "cook"]}


def test_load_unload_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeTriton() as server:
        server.results |= {
            "load_adapter": POET, "unload_adapter": {"name": "poet", "generation": 3, "users": 2},
            "list_adapters": {"adapters": [POET], "mixes": [MIX], "slots": 8}, "load_xlora": MIX,
        }  # fmt: skip
        url = ["--url", server.url]
        assert main(["adapters", "load", "poet", "poets/poet", "--pinned", "--admin-token", "s", *url]) == 0
        assert main(["adapters", "unload", "poet", *url]) == 0
        assert main(["adapters", "load-xlora", "mixes/m", "--name", "m", *url]) == 0
        assert main(["adapters", "list", *url]) == 0
        assert main(["adapters", "list", "--json", *url]) == 0
        assert server.commands == [
            ("load_adapter", {"admin_token": "s", "name": "poet", "path": "poets/poet", "pinned": True}),
            ("unload_adapter", {"name": "poet"}),
            ("load_xlora", {"path": "mixes/m", "name": "m"}),
            ("list_adapters", {}),
            ("list_adapters", {}),
        ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        "loaded poet, generation 3",
        "unloaded poet; 2 running requests still use it",
        "loaded m, generation 7, a mix of poet, cook",
        "name  generation  rank  modules  bytes     slot  users  source",
        "poet  3           16    224      84000000  -     2      poets/poet",
        "mix m: poet, cook",
    ]
    assert json.loads("\n".join(lines[6:])) == {"adapters": [POET], "mixes": [MIX], "slots": 8}


def test_an_adapter_is_an_option() -> None:
    with FakeTriton() as server:
        assert main(["generate", "Hi", "--url", server.url, "--adapter", "a:0.7,b:0.3"]) == 0
        assert server.generations[0].parameters["adapter"] == "a:0.7,b:0.3"


def test_both_clients_have_the_commands() -> None:
    with FakeTriton() as server:
        server.results |= {name: {"slots": 1} for name in (*COMMANDS, "load_xlora")}

        async def use() -> None:
            async with AsyncTridentClient(server.url) as client:
                await client.load_adapter("a", "p")
                await client.unload_adapter("a")
                await client.list_adapters()
                await client.load_xlora("m")

        asyncio.run(use())
        with TridentClient(server.url) as client:
            client.load_adapter("a", "p")
            client.unload_adapter("a")
            client.list_adapters()
            client.load_xlora("m")
        expected = [
            ("load_adapter", {"name": "a", "path": "p", "pinned": False}), ("unload_adapter", {"name": "a"}),
            ("list_adapters", {}), ("load_xlora", {"path": "m", "name": "xlora"}),
        ]  # fmt: skip
        assert server.commands == expected * 2


def test_scalings_come_with_the_answer() -> None:

    first, last = Chunk(text="a", scalings={"one": 0.4}), Chunk(text="b", finish_reason="stop", scalings={"one": 0.6})
    assert Completion.from_chunks([first, last]).samples[0].scalings == {"one": 0.6}
