"""Held-out loss of the demonstration mix beside its adapters and the base; to load_tests/results/xlora_quality.jsonl.

    python load_tests/bench_xlora_quality.py --model MODEL [--mix examples/xlora_smollm2] [--device cuda]

MODEL is what the mix was trained on. Losses are means over the tokens of completions, of examples that training has not
seen, by PEFT in float32. The mix's scalings are means over tokens, modules and examples of a task.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from results_file import RESULTS, ResultsFile
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.train_xlora import encode, load_base, load_mix
from examples.xlora_tasks import TASKS, Example, examples, mixture

SEED = 9
"""Training takes 0 and 1."""
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", default="smollm2-135m")
    parser.add_argument("--mix", type=Path, default=Path("examples/xlora_smollm2"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=96, help="examples of each task")
    parser.add_argument("--out", type=Path, default=RESULTS / "xlora_quality.jsonl")
    args = parser.parse_args()
    base, tokenizer = load_base(args.model, args.device)
    evaluate(base, tokenizer, args)


def evaluate(base: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    """Record every loss, and the mix's scalings."""
    sets = {task: examples(task, args.count, SEED) for task in TASKS} | {"mixture": mixture(args.count, SEED)}
    for variant, make in variants(base, args.mix).items():
        model = make().eval()
        results = ResultsFile(
            path=args.out, benchmark="bench_xlora_quality", model=args.name, variant=variant,
            settings={"examples": args.count, "mix": args.mix.name},
        )  # fmt: skip
        for name, data in sets.items():
            results.record(name, "loss", [mean_loss(model, tokenizer, data, args.device)])
            if variant == "mix":
                for task, scaling in zip(TASKS, mean_scalings(model, tokenizer, data, args.device), strict=True):
                    results.record(name, f"scaling_of_{task}", [scaling])


def variants(base: Any, mix: Path) -> dict[str, Callable[[], Any]]:
    """How to make each model that is compared."""

    def adapted(task: str) -> Callable[[], Any]:
        return lambda: peft.PeftModel.from_pretrained(copy.deepcopy(base), mix / "adapters" / task)

    return {"base": lambda: base, **{task: adapted(task) for task in TASKS}, "mix": lambda: trained_mix(base, mix)}


def trained_mix(base: Any, mix: Path) -> Any:
    """PEFT's model of a mix in the xlora package's files."""
    config = json.loads((mix / "xlora_config.json").read_text())
    model = load_mix(base, mix / "adapters", layerwise_scalings=config["layerwise_scalings"])
    saved = load_file(mix / "xlora_classifier.safetensors")
    linears = [layer for layer in model.base_model.internal_xlora_classifier.layers if hasattr(layer, "weight")]
    names = [*(f"inner.{2 * index}" for index in range(len(linears) - 1)), "last"]
    for name, layer in zip(names, linears, strict=True):
        layer.load_state_dict({kind: saved[f"{name}.{kind}"] for kind in ("weight", "bias")})
    return model


@torch.inference_mode()
def mean_loss(model: Any, tokenizer: Any, data: Sequence[Example], device: str) -> float:
    """Cross entropy in nats per token of the completions."""
    total = count = 0.0
    for batch in batches(tokenizer, data, device):
        num_tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch).loss.item() * num_tokens
        count += num_tokens
    return total / count


@torch.inference_mode()
def mean_scalings(model: Any, tokenizer: Any, data: Sequence[Example], device: str) -> list[float]:
    """Of each member, over the tokens of the completions and all modules."""
    total, count = torch.zeros(len(TASKS), device=device), 0
    for batch in batches(tokenizer, data, device):
        model(**batch)
        wanted = batch["labels"] != -100
        scalings = model.base_model.internal_xlora_scalings[wanted].float()
        total += scalings.mean(1).sum(0)
        count += len(scalings)
    means: list[float] = (total / count).tolist()
    return means


def batches(tokenizer: Any, data: Sequence[Example], device: str) -> list[dict[str, torch.Tensor]]:
    return [encode(tokenizer, data[start : start + BATCH], device) for start in range(0, len(data), BATCH)]


if __name__ == "__main__":
    main()
