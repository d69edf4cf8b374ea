"""X-LoRA mixes for tests, in the xlora package's files, and PEFT's XLoraModel with the same values as the oracle."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.fakes.peft_adapters import write_adapter


def write_mix(
    base: Any, folder: Path, members: dict[str, dict[str, Any]], *, seed: int = 0, spread: float = 3.0, **config: Any
) -> Any:
    """Save a mix of random members to ``folder``; returns PEFT's model of it. ``base``: a transformers model.

    ``members``: arguments of ``write_adapter`` by name. ``config`` goes to PEFT's XLoraConfig. spread: of the
    classifier's outputs; 0 would weigh all alike.
    """
    import peft

    for index, (name, arguments) in enumerate(members.items()):
        write_adapter(base, folder / "adapters" / name, seed=100 * seed + index, **arguments)
    model = copy.deepcopy(base)
    model.config.use_cache = False
    # PEFT finds members by their number only.
    paths = {str(index): str(folder / "adapters" / name) for index, name in enumerate(members)}
    values = {"xlora_size": 24, "hidden_size": base.config.hidden_size, **config}
    mix = peft.get_peft_model(model, peft.XLoraConfig(task_type="CAUSAL_LM", adapters=paths, **values))
    classifier = mix.base_model.internal_xlora_classifier
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in classifier.named_parameters():
        size = spread / parameter.shape[-1] ** 0.5 if name.endswith("weight") else 0.3
        parameter.data = size * torch.randn(parameter.shape, generator=generator)
    saved = {key: value for key, value in mix.peft_config["default"].to_dict().items() if key != "peft_type"}
    saved["adapters"] = {name: f"adapters/{name}" for name in members}
    (folder / "xlora_config.json").write_text(json.dumps(saved, default=str))
    linears = [layer for layer in classifier.layers if isinstance(layer, torch.nn.Linear)]
    tensors = {}
    for index, layer in enumerate(linears):
        name = "last" if index == len(linears) - 1 else f"inner.{2 * index}"
        tensors |= {f"{name}.weight": layer.weight.data.clone(), f"{name}.bias": layer.bias.data.clone()}
    save_file(tensors, folder / "xlora_classifier.safetensors")
    return mix.eval()


def greedy_without_cache(mix: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """X-LoRA with a cache is what PEFT does not have."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(mix(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def scalings(mix: Any, token_ids: list[int]) -> torch.Tensor:
    """[tokens, modules, adapters], after the softmax and before top-k."""
    with torch.inference_mode():
        mix(input_ids=torch.tensor([token_ids]))
    return mix.base_model.internal_xlora_scalings[0]
