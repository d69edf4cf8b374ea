"""Run by test_gpu_path_with_adapters in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.adapters.helpers import make_submit, run
from tests.fakes.fake_cuda import run_gpu_path_on_cpu
from tests.fakes.peft_adapters import write_adapter
from tests.fakes.tiny_models import write_tiny_llama
from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore

CONFIGS = {"a": {"r": 4}, "b": {"r": 17, "targets": ("q_proj", "v_proj", "down_proj")}, "c": {"r": 3, "use_dora": True}}
SPECS = ("", "a", "b", "c", "a:0.5,c:-0.7")


@pytest.mark.parametrize(("slots", "late"), [(3, ""), (2, ""), (3, "c")], ids=["all", "swapped", "late-dora"])
def test_tokens_equal_those_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int, late: str
) -> None:
    """``late`` is loaded when the graphs have been captured."""
    from transformers import AutoModelForCausalLM

    folder = write_tiny_llama(tmp_path / "base", attention_bias=True)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for index, (name, config) in enumerate(CONFIGS.items()):
        write_adapter(base, tmp_path / name, seed=index, **config)
    config = EngineConfig(
        model=str(folder), dtype="fp32", device="cpu", max_num_blocks=64, block_size=8, max_num_seqs=6,
        adapters=",".join(f"{name}={tmp_path / name}" for name in CONFIGS if name != late), max_lora_rank=24,
        max_loras=slots, max_num_batched_tokens=32, adapter_root=str(tmp_path),
    )  # fmt: skip
    choose = random.Random(3)
    prompts = [choose.choices(range(5, 300), k=choose.randint(3, 30)) for _ in range(6)]

    def tokens() -> list[list[int]]:
        core = EngineCore(config)
        if late:
            reply = core.run_command("load_adapter", {"name": late, "path": str(tmp_path / late)})
            while not reply.done():
                core.poll()
            reply.result()
        submits = [make_submit(prompt, SPECS[index % 5], max_tokens=3) for index, prompt in enumerate(prompts)]
        found = run(core, submits, steps_between=2)
        assert core.stats()["adapter_slot_loads_total"] >= 3
        core.close()
        return [found[submit.request_id] for submit in submits]

    expected = tokens()
    run_gpu_path_on_cpu(monkeypatch)
    assert tokens() == expected
