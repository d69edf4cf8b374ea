"""``trident quantize`` and ``trident estimate``: the engine's work on a model's weights, for which no server runs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from .cli_options import add_isq_settings
from .errors import EngineFailed, parse_error


def add_weights_commands(commands: Any, epilog: str) -> None:
    """Add both to the subcommands of a parser."""
    quantize = _command(commands, "quantize", "quantize a model and write it as a safetensors folder", epilog)
    quantize.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write; it must not exist yet")
    estimate = _command(commands, "estimate", "tell what memory a model's weights take, and what they leave", epilog)
    estimate.add_argument("--gpu-memory", metavar="SIZE", help="of the GPU, as 80GiB (this machine's GPU, or the CPU)")
    estimate.add_argument("--stream-tokens", type=int, metavar="NUMBER",
                          help="of a stream, prompt and output: tell how many streams there is room for")  # fmt: skip
    estimate.add_argument("--json", action="store_true", help="print it as JSON")


def _command(commands: Any, name: str, meaning: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=meaning, description=meaning, epilog=epilog, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face id, or a local folder or .gguf file")
    add_isq_settings(parser, "a setting; may be repeated")
    parser.set_defaults(run_locally=_runner(name))
    return parser


def _runner(name: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        try:
            module = importlib.import_module("trident_llm.launch.weights_commands")
        except ImportError as error:
            raise EngineFailed(f"{name} needs the engine: pip install trident-llm[server] ({error})") from error
        backend_errors = importlib.import_module("trident_llm.errors")
        try:
            return int(getattr(module, name)(arguments))
        except backend_errors.TridentError as error:
            raise parse_error(str(error)) from error

    return run
