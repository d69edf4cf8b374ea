"""What ``trident openai`` makes of the arguments that a container gives it after those of the image."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence

from tests.launch.helpers import ROOT
from trident_client.cli_openai import add_openai_command


def gateway_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Ends the process when they are wrong. The keys come from the environment."""
    entry = re.search(r'(?m)^ENTRYPOINT (\[.*"openai".*\])$', (ROOT / "Dockerfile").read_text())
    assert entry
    program, *first = json.loads(entry[1])
    assert program.endswith("/trident")
    parser = argparse.ArgumentParser()
    add_openai_command(parser.add_subparsers(), "")
    return parser.parse_args([*first, *arguments])
