"""Documents as the tests read them: blocks of code, prose, and the commands within it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.launch.helpers import ROOT

README, OPERATIONS = ROOT / "README.md", ROOT / "docs/operations.md"
GATEWAY = ".venv/bin/trident openai "
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_PROGRAM = re.compile(
    r"\.venv/bin/|scripts/|load_tests/\w+\.py|"
    r"(trident|python3?|pip|curl|docker|helm|kubectl|cd|cp|bash|sh)(?= |$)"
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str

    @property
    def starts_the_project(self) -> bool:
        """Whether it is a command that goes on until it is ended, or the whole of the tests."""
        return self.code.startswith(("scripts/", GATEWAY))


def blocks_in(text: str) -> list[Block]:
    return [Block(language, code) for language, code in _BLOCK.findall(text)]


def blocks_of(document: Path) -> list[Block]:
    return blocks_in(document.read_text())


def prose_in(text: str) -> str:
    return _BLOCK.sub("", text)


def prose_of(document: Path) -> str:
    return prose_in(document.read_text())


def commands_within(prose: str) -> list[str]:
    """What stands between backquotes and begins with a program, each once."""
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))
    return list(dict.fromkeys(span for span in spans if _PROGRAM.match(span)))


def sample_output(document: Path) -> str:
    """The first output that is shown, indented, as a pattern."""
    shown = re.search(r"(?m)(?:^    .+\n)+", document.read_text())
    assert shown
    return re.escape("\n".join(line[4:] for line in shown[0].splitlines()))
