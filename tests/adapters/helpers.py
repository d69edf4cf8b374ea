"""Engines of a model with adapters, and the tokens of their requests."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore
from trident_llm.protocol import SamplingParams, Submit

NEW_TOKENS = 10
_names = itertools.count()


@dataclass(frozen=True)
class AdaptedModel:
    """A small random model on disk with four adapters that PEFT wrote, and PEFT's models of them."""

    folder: Path
    base: Any
    root: Path
    """Below it lie a, b, c and d."""
    oracles: dict[str, Any]

    def path(self, name: str) -> Path:
        return self.root / name


def make_core(adapted: AdaptedModel, *, adapter_folder: Path | None = None, **settings: Any) -> EngineCore:
    values = {
        "dtype": "fp32", "device": "cpu", "max_num_blocks": 512, "block_size": 8, "max_num_seqs": 64,
        "adapter_root": str(adapted.root), "max_lora_rank": 8, "max_loras": 4,
        "adapters": ",".join(f"{name}={adapted.path(name)}" for name in adapted.oracles),
        **settings,
    }  # fmt: skip
    return EngineCore(EngineConfig(model=str(adapted.folder), **values), adapter_folder=adapter_folder)


def make_submit(prompt: list[int], adapter: str = "", max_tokens: int = NEW_TOKENS, **fields: Any) -> Submit:
    params = SamplingParams(seed=0, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Submit(request_id=f"r{next(_names)}", prompt_ids=prompt, params=params, adapter=adapter, **fields)


def run(core: EngineCore, submits: list[Submit], steps_between: int = 0) -> dict[str, list[int]]:
    """Tokens by request id; ``steps_between`` steps pass before each next submission."""
    tokens: dict[str, list[int]] = {}
    waiting = list(submits)
    for step in itertools.count():
        while waiting and (not steps_between or step % steps_between == 0):
            core.add(waiting.pop(0))
            if steps_between:
                break
        if not core.has_work() and not waiting:
            break
        for delta in core.step():
            assert not delta.error, delta.error
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        core.check_integrity()
        assert step < 5000
    return tokens


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(5, 300), k=length)
