"""Trains the demonstration mix examples/xlora_smollm2: three LoRA adapters and an X-LoRA classifier, with PEFT.

    python -m examples.train_xlora --model MODEL [--out FOLDER] [--device cuda]

MODEL is SmolLM2-135M-Instruct as a Hugging Face id, a folder or a .gguf file. Deterministic on one machine. The shipped
setting takes less than half an hour on two cores of a CPU, and a few minutes on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.xlora_tasks import TASKS, Example, examples, mixture

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Named in what is written, wherever the base was read from."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 4
ADAPTED_LAYERS = 15
"""The last ones: nothing below them needs a gradient."""
CLASSIFIER_SIZE = 32
ROUTING_WEIGHT = 0.1
"""Of the routing loss beside the language model's, which hardly asks for more than half of the right adapter."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face id, folder or .gguf file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "xlora_smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--adapter-steps", type=int, default=60)
    parser.add_argument("--classifier-steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="examples per step")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load_base(options.model, options.device)
    for task in TASKS:
        train_adapter(model, tokenizer, task, options)
    train_classifier(model, tokenizer, options)
    (options.out / "README.md").write_text(model_card(options))


def load_base(name: str, device: str) -> tuple[Any, Any]:
    """Model in float32 and tokenizer."""
    path = Path(name)
    source, extra = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **extra)
    return model.to(device), AutoTokenizer.from_pretrained(source, **extra)


def train_adapter(base: Any, tokenizer: Any, task: str, options: argparse.Namespace) -> None:
    """Train one LoRA adapter on its task and save it in 16 bits."""
    num_layers = base.config.num_hidden_layers
    model = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=4 * RANK, target_modules=TARGETS,
            layers_to_transform=list(range(num_layers - min(ADAPTED_LAYERS, num_layers), num_layers)),
        ),
    )  # fmt: skip
    data = examples(task, options.adapter_steps * options.batch, seed=0)
    _train(model, model.parameters(), _batches(tokenizer, data, options), 2e-3, f"adapter {task}")
    folder = options.out / "adapters" / task
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}, path)


def train_classifier(base: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """Train the classifier on all tasks, with the adapters as they are, and save it as the xlora package does."""
    torch.manual_seed(1)
    model = load_mix(base, options.out / "adapters", layerwise_scalings=True, xlora_dropout_p=0.0)
    classifier = model.base_model.internal_xlora_classifier
    data = [entry for task in TASKS for entry in examples(task, options.classifier_steps * options.batch // 4, seed=1)]
    data += mixture(options.classifier_steps * options.batch - len(data), seed=1)
    random.Random(0).shuffle(data)
    batches = _batches(tokenizer, data, options)
    tasks = [list(TASKS).index(entry.task) for entry in data]
    chosen = [torch.tensor(tasks[start : start + options.batch]) for start in range(0, len(tasks), options.batch)]

    def routing_loss(step: int) -> Tensor:
        """Cross entropy between scalings and the completions' tasks, mean over their tokens and all modules."""
        wanted = batches[step]["labels"] != -100
        scalings = model.base_model.internal_xlora_scalings[wanted].float()
        right = chosen[step].to(scalings.device).repeat_interleave(wanted.sum(1))
        own = scalings.gather(2, right[:, None, None].expand(-1, scalings.shape[1], 1))
        return -ROUTING_WEIGHT * own.clamp_min(1e-6).log().mean()

    _train(model, classifier.parameters(), batches, 5e-3, "classifier", routing_loss)
    linears = [layer for layer in classifier.layers if isinstance(layer, torch.nn.Linear)]
    names = [*(f"inner.{2 * index}" for index in range(len(linears) - 1)), "last"]
    save_file(
        {f"{name}.{kind}": value.detach().cpu().contiguous() for name, layer in zip(names, linears, strict=True)
         for kind, value in layer.named_parameters()},
        options.out / "xlora_classifier.safetensors",
    )  # fmt: skip
    config = {
        "hidden_size": base.config.hidden_size, "adapters": {task: f"adapters/{task}" for task in TASKS},
        "xlora_depth": 2, "xlora_size": CLASSIFIER_SIZE, "layerwise_scalings": True, "enable_softmax": True,
        "softmax_temperature": 1.0, "scaling_pass_value": 0.0, "global_scaling_weight": 1.0, "top_k_lora": None,
    }  # fmt: skip
    (options.out / "xlora_config.json").write_text(json.dumps(config, indent=2) + "\n")


def model_card(options: argparse.Namespace) -> str:
    """What stands beside the files."""
    tasks = ", ".join(TASKS)
    return f"""---
license: apache-2.0
base_model: {BASE_MODEL}
library_name: peft
---

# A small X-LoRA mix for SmolLM2-135M-Instruct

Three LoRA adapters ({tasks}) of rank {RANK} on the last {ADAPTED_LAYERS} layers, and a classifier that weighs them per
token and module. For trying X-LoRA out, not for use: each adapter knows one kind of generated sentence.

Made by `python -m examples.train_xlora` with {options.adapter_steps} steps per adapter and {options.classifier_steps}
for the classifier, {options.batch} examples each. The data is generated by `examples/xlora_tasks.py`: JSON records from
sentences about people, SQL queries from questions, ISO dates from dates in words; an id, a limit and a time of day in
them are random.
`load_tests/bench_xlora_quality.py` measures the result.
"""


def load_mix(base: Any, adapters: Path, **config: Any) -> Any:
    """PEFT's X-LoRA model of the adapters below a folder, with a fresh classifier."""
    model = copy.deepcopy(base)
    model.config.use_cache = False
    return peft.get_peft_model(
        model,
        peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, xlora_depth=2, xlora_size=CLASSIFIER_SIZE,
            # PEFT finds members by their number only.
            adapters={str(index): str(adapters / task) for index, task in enumerate(TASKS)}, **config,
        ),
    )  # fmt: skip


def encode(tokenizer: Any, data: Sequence[Example], device: str) -> dict[str, Tensor]:
    """A batch; only completions have labels."""
    rows = []
    for entry in data:
        texts = (entry.prompt, entry.completion)
        rows.append([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, labels, mask = (torch.full((len(rows), width), fill) for fill in (0, -100, 0))
    for index, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[index, :end] = torch.tensor(prompt + completion)
        labels[index, len(prompt) : end] = torch.tensor(completion)
        mask[index, :end] = 1
    return {"input_ids": ids.to(device), "labels": labels.to(device), "attention_mask": mask.to(device)}


def _batches(tokenizer: Any, data: Sequence[Example], options: argparse.Namespace) -> list[dict[str, Tensor]]:
    starts = range(0, len(data), options.batch)
    return [encode(tokenizer, data[start : start + options.batch], options.device) for start in starts]


def _train(
    model: Any,
    parameters: Iterable[Tensor],
    batches: list[dict[str, Tensor]],
    rate: float,
    what: str,
    other_loss: Callable[[int], Tensor] | None = None,
) -> None:
    """One pass over the batches with AdamW, the rate falling to 0. other_loss: of a batch by its number, added."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    model.train()
    began = time.monotonic()
    for step, batch in enumerate(batches):
        loss = model(**batch).loss
        whole = loss if other_loss is None else loss + other_loss(step)
        optimizer.zero_grad()
        whole.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == len(batches) - 1:
            print(f"{what}: step {step}, loss {loss.item():.4f}, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
