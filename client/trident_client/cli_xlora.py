"""``trident xlora show``: which adapters of an X-LoRA mix answer, token by token and layer by layer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cli_options import add_options, given_options
from .cli_output import MakeCommand
from .client import TridentClient
from .errors import BadRequest
from .results import Chunk


@dataclass(frozen=True)
class Routing:
    """What a mix did for an answer. ``texts`` and ``scalings`` go by token; a text that was held back is empty."""

    adapters: tuple[str, ...]
    texts: tuple[str, ...]
    scalings: tuple[dict[str, list[float]], ...]
    """Of each adapter, by layer."""


def add_xlora_command(commands: Any, make: MakeCommand) -> None:
    """Add ``xlora show`` to the subcommands of a parser."""
    meaning = "see what an X-LoRA mix does"
    group = commands.add_parser("xlora", help=meaning, description=meaning, allow_abbrev=False)
    actions = group.add_subparsers(required=True, metavar="ACTION")
    show = make(actions, "show", "answer a prompt, and show the scalings by token and layer", _show)
    show.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    show.add_argument("--out", type=Path, default=Path("xlora.png"), help="the picture (%(default)s)")
    add_options(show)


def _show(client: TridentClient, arguments: argparse.Namespace) -> int:
    options = {"max_tokens": 32, **given_options(arguments), "return_layer_scalings": True}
    routing = routing_of(list(client.generate(arguments.prompt, timeout=arguments.timeout, **options)))
    print(routing_table(routing), flush=True)
    draw_routing(routing, arguments.out)
    print(f"picture: {arguments.out}", flush=True)
    return 0


def routing_of(chunks: Sequence[Chunk]) -> Routing:
    """Put the chunks of one answer together. Raises ``BadRequest`` when no mix took part."""
    texts: list[str] = []
    scalings: list[dict[str, list[float]]] = []
    for chunk in chunks:
        for position, row in enumerate(chunk.layer_scalings or ()):
            scalings.append(row)
            # Text comes by chunk: what its tokens say together stands with the first.
            texts.append(chunk.text if position == 0 else "")
    if not scalings:
        raise BadRequest("xlora: no X-LoRA mix took part in the answer; load one, and leave out adapter and no-xlora")
    return Routing(tuple(scalings[0]), tuple(texts), tuple(scalings))


def routing_table(routing: Routing) -> str:
    """A line per token: the mean over layers of each adapter's scaling; the mean over all at the end."""
    rows = [[_mean(row[name]) for name in routing.adapters] for row in routing.scalings]
    means = [_mean([row[index] for row in rows]) for index in range(len(routing.adapters))]
    labels = [*(repr(text)[1:-1] for text in routing.texts), "mean"]
    width = max(map(len, labels))
    widths = [max(len(name), 5) for name in routing.adapters]
    lines = ["  ".join([" " * width, *(name.rjust(size) for name, size in zip(routing.adapters, widths, strict=True))])]
    for label, values in zip(labels, [*rows, means], strict=True):
        cells = (f"{value:.3f}".rjust(size) for value, size in zip(values, widths, strict=True))
        lines.append("  ".join([label.ljust(width), *cells]))
    return "\n".join(lines)


def draw_routing(routing: Routing, path: Path) -> None:
    """One panel per adapter: tokens from left to right, layers from bottom to top. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadRequest("out: pictures need matplotlib, which is not installed") from None
    count, num_tokens = len(routing.adapters), len(routing.texts)
    figure = Figure(figsize=(max(6.0, 0.3 * num_tokens + 2), 2.4 * count + 0.8), layout="constrained")
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for panel, name in zip(panels, routing.adapters, strict=True):
        by_layer = list(zip(*(row[name] for row in routing.scalings), strict=True))
        image = panel.imshow(by_layer, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis")
        panel.set_title(name, loc="left")
        panel.set_ylabel("layer")
    panels[-1].set_xticks(range(num_tokens), [text.strip() for text in routing.texts], rotation=90)
    figure.colorbar(image, ax=list(panels), label="scaling")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise BadRequest(f"out: {str(path)!r} cannot be written: {error}") from None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
