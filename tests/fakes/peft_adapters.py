"""Adapters that PEFT itself writes, with random values large enough to change what a small model says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def write_adapter(
    base: Any, folder: Path, *, seed: int, targets: tuple[str, ...] = ALL_LINEAR, size: float = 0.3, **config: Any
) -> Any:
    """Save an adapter of ``base``, a transformers model, to ``folder``; returns PEFT's model with it, the oracle.

    ``config`` goes to PEFT's LoraConfig. size: of the updates, relative to what random weights of the base give.
    """
    import peft

    config = {"r": 4, "lora_alpha": 8, **config}
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=list(targets), **config)
    )
    randomize(model, seed, size)
    model.save_pretrained(folder)
    return model.eval()


def randomize(model: Any, seed: int, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
        elif "lora_B" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
        elif "lora_magnitude_vector" in name:
            parameter.data = parameter.data * (0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))


def peft_blend(base: Any, weights: dict[Path, float]) -> Any:
    """PEFT's model of a blend: ``combination_type="cat"`` adds the updates up exactly."""
    import peft

    model = None
    for index, folder in enumerate(weights):
        if model is None:
            model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name="a0")
        else:
            model.load_adapter(folder, adapter_name=f"a{index}")
    assert model is not None
    names = [f"a{index}" for index in range(len(weights))]
    model.add_weighted_adapter(names, list(weights.values()), "blend", combination_type="cat")
    model.set_adapter("blend")
    return model.eval()


def logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids), vocab] float32."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].float()


def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """The most likely tokens after ``prompt``."""
    tokens: list[int] = []
    cache, ids = None, torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(num_tokens):
            output = model(ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(ids))
    return tokens
