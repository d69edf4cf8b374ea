"""docs/migration.md: the settings, options, metrics and links it names are there."""

from __future__ import annotations

import re
from dataclasses import fields

from tests.launch.helpers import ROOT
from trident_llm.config import EngineConfig
from trident_llm.options import VLLM_DEFAULTS

TEXT = (ROOT / "docs/migration.md").read_text()
README = (ROOT / "README.md").read_text()


def test_settings_are_known() -> None:
    rows = re.findall(r"^\| `.*? \| (`.*) \|$|^\| `quantization` \| (.*) \|$", TEXT, re.MULTILINE)
    named = {name for row in rows for text in row for name in re.findall(r"`(\w+)`", text)}
    assert len(named) > 14
    assert named <= {field.name for field in fields(EngineConfig)}


def test_options_are_those_of_the_readme() -> None:
    section = TEXT.partition("## Options and outputs")[2].partition("\n## ")[0]
    start, missing, rest = section.partition("These of vLLM's sampling parameters are not there:")
    absent, _, end = rest.partition("\n\n")
    assert missing
    for name in re.findall(r"`(\w+)`", start + end):
        assert f"| `{VLLM_DEFAULTS.other_names.get(name, name)}` |" in README, name
    for name in re.findall(r"`(\w+)`", absent.partition(".")[0]):
        assert f"| `{name}` |" not in README, name


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, anchor = link.partition("#")
        target = ROOT / "docs" / path
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, link
