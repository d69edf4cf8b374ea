"""Run by test_gpu_path_with_adapters in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.helpers import make_submit, run
from tests.fakes.fake_cuda import run_gpu_path_on_cpu
from tests.fakes.peft_mixes import write_mix
from tests.fakes.tiny_models import write_tiny_llama
from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore

MEMBERS: dict[str, dict[str, Any]] = {"one": {"r": 4}, "two": {"r": 3, "targets": ("q_proj", "up_proj")}}


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({}, {"layerwise_scalings": True, "xlora_depth": 2}),
        ({"freeze_after": 1, "captures": False}, {"scaling_pass_value": 0.3}),
    ],
    ids=["graphs", "frozen-without-graphs"],
)
def test_tokens_equal_those_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], config: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_tiny_llama(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    write_mix(base, tmp_path / "mix", MEMBERS, **config)
    at_start = settings.pop("captures", True)
    engine_config = EngineConfig(
        model=str(folder), dtype="fp32", device="cpu", max_num_blocks=64, block_size=8, max_num_seqs=6,
        max_lora_rank=8, max_loras=3, max_num_batched_tokens=32, adapter_root=str(tmp_path),
        xlora=str(tmp_path / "mix") if at_start else "", **settings,
    )  # fmt: skip
    choose = random.Random(3)
    prompts = [choose.choices(range(5, 300), k=choose.randint(3, 24)) for _ in range(5)]
    options: list[dict[str, Any]] = [
        {"return_scalings": True}, {"xlora": False}, {"adapter": "one"}, {}, {"xlora_top_k": 1}
    ]  # fmt: skip

    def tokens() -> list[list[int]]:
        core = EngineCore(engine_config)
        assert core.adapters is not None
        if not at_start:
            core.adapters.wait(core.run_command("load_xlora", {"path": "mix"}))
        submits = [make_submit(prompt, max_tokens=4, **extra) for prompt, extra in zip(prompts, options, strict=True)]
        found = run(core, submits, steps_between=2)
        core.close()
        return [found[submit.request_id] for submit in submits]

    expected = tokens()
    run_gpu_path_on_cpu(monkeypatch)
    assert tokens() == expected
