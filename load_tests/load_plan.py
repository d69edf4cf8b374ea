"""What the processes of a load run must know of the run and its server: one JSON file, which its parent writes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
from profiles import Profile

PLAN = "plan.json"
PLAN_VARIABLE = "TRIDENT_LOAD_PLAN"
"""The environment variable that names the file."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    profile: Profile
    seed: int
    """Of the requests that users draw. A new one for each run: prompts of an earlier run may be in the prefix cache."""
    grpc: str
    """host:port"""
    http: str
    """host:port"""
    alphabet: str
    """Characters that are one token each, whatever stands beside them."""
    num_added: int
    """Tokens that the tokenizer adds to each prompt."""
    has_chat_template: bool
    adapters: list[str]
    """Names of the adapters that the server has."""
    has_mix: bool
    """Whether requests without an adapter use an X-LoRA mix unless they decline."""

    def write(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self)) + b"\n")

    @classmethod
    def read(cls, path: Path) -> Plan:
        return msgspec.json.decode(path.read_bytes(), type=cls)

    @classmethod
    def of_environment(cls) -> Plan:
        """Raises ``SystemExit`` when this process is no part of a run."""
        if PLAN_VARIABLE not in os.environ:
            raise SystemExit("start the load test with: python load_tests/run_load.py --profile NAME")
        return cls.read(Path(os.environ[PLAN_VARIABLE]))
