"""The training recipe makes a mix that the engine serves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from examples import train_xlora
from examples.xlora_tasks import TASKS, examples, mixture
from tests.adapters.helpers import AdaptedModel
from trident_llm import Engine, EngineConfig


class ByteTokenizer:
    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_data_is_the_same_every_time_and_each_task_its_own() -> None:
    for task in TASKS:
        assert examples(task, 5, seed=1) == examples(task, 5, seed=1) != examples(task, 5, seed=2)
    starts = {examples(task, 1, seed=0)[0].prompt.split(":")[0] for task in TASKS}
    assert len(starts) == len(TASKS)
    assert {entry.prompt.split(":")[0] for entry in mixture(6, seed=0)} == starts


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(out=tmp_path, device="cpu", adapter_steps=2, classifier_steps=2, batch=6)


def test_a_trained_mix_is_served(
    adapted: AdaptedModel, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_xlora, "CLASSIFIER_SIZE", 16)
    torch.manual_seed(0)
    for task in TASKS:
        train_xlora.train_adapter(adapted.base, ByteTokenizer(), task, options)
    train_xlora.train_classifier(adapted.base, ByteTokenizer(), options)
    assert "60" not in train_xlora.model_card(options) and "license: apache-2.0" in train_xlora.model_card(options)
    config = EngineConfig(
        model=str(adapted.folder), dtype="fp32", device="cpu", max_num_blocks=64, xlora=str(options.out),
        max_lora_rank=4,
    )  # fmt: skip
    monkeypatch.syspath_prepend(Path(train_xlora.__file__).parents[1] / "load_tests")
    import bench_xlora_quality

    args = argparse.Namespace(
        mix=options.out, device="cpu", count=6, out=options.out / "quality.jsonl", name="tiny"
    )
    bench_xlora_quality.evaluate(adapted.base, ByteTokenizer(), args)
    lines = [json.loads(line) for line in args.out.read_text().splitlines()]
    assert len(lines) == 5 * 4 + 3 * 4
    scalings = [line["value"] for line in lines if line["workload"] == "json" and line["metric"] != "loss"]
    assert sum(scalings) == pytest.approx(1, abs=1e-3)
    import xlora_picture

    xlora_picture.draw(xlora_picture.read_measured(args.out, "tiny"), options.out / "picture.png")
    assert (options.out / "picture.png").stat().st_size > 1000
    with Engine(config) as engine:
        (output,) = engine.generate("Date: 3 May 1999\n", stream=False, max_tokens=5, return_scalings=True)
        assert output.scalings is not None and list(output.scalings) == list(TASKS)
        assert sum(output.scalings.values()) == pytest.approx(1, abs=1e-4)
        assert [adapter["name"] for adapter in engine.list_adapters()["adapters"]] == list(TASKS)
        (member,) = engine.generate("Date: 3 May 1999\n", stream=False, max_tokens=5, adapter="dates")
        assert member.scalings is None
        engine.check_integrity()


def test_the_shipped_mix_knows_its_tasks(smollm2_gguf: Path) -> None:
    mix = Path(train_xlora.__file__).parent / "xlora_smollm2"
    for file in mix.glob("adapters/*/adapter_config.json"):
        assert json.loads(file.read_text())["base_model_name_or_path"] == train_xlora.BASE_MODEL
    config = EngineConfig(
        model=str(smollm2_gguf), device="cpu", max_num_blocks=64, max_model_len=256, max_num_seqs=4, xlora=str(mix)
    )
    with Engine(config) as engine:
        for task in TASKS:
            (example,) = examples(task, 1, seed=5)
            (output,) = engine.generate(example.prompt, stream=False, max_tokens=8, temperature=0, return_scalings=True)
            assert output.scalings is not None and output.scalings[task] > 0.6
            assert output.text[:4] == example.completion[:4]
