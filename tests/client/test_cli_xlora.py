"""The table and the picture of what an X-LoRA mix does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.fake_triton import FakeTriton
from trident_client.cli import main
from trident_client.cli_xlora import draw_routing, routing_of, routing_table
from trident_client.errors import BadRequest
from trident_client.results import Chunk

CHUNKS = [
    Chunk(text="Hi", layer_scalings=[{"one": [0.2, 0.4], "second": [0.8, 0.6]}]),
    Chunk(text=""),
    Chunk(text=" you\n", layer_scalings=[{"one": [1.0, 1.0], "second": [0.0, 0.0]}] * 2, finish_reason="stop"),
]


def test_the_table_has_a_line_per_token() -> None:
    assert routing_table(routing_of(CHUNKS)).splitlines() == [
        "          one  second",
        "Hi      0.300   0.700",
        " you\\n  1.000   0.000",
        "        1.000   0.000",
        "mean    0.767   0.233",
    ]


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "routing.png"
    draw_routing(routing_of(CHUNKS), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadRequest, match=r"out: .* cannot be written"):
        draw_routing(routing_of(CHUNKS), tmp_path / "nowhere" / "routing.png")


def test_an_answer_without_a_mix_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeTriton() as server:
        assert main(["xlora", "show", "Hi", "--url", server.url]) == 2
        assert server.generations[0].parameters["return_layer_scalings"] is True
    assert "no X-LoRA mix took part" in capsys.readouterr().err
