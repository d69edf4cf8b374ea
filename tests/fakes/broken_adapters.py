"""Ways to spoil an adapter's folder, and what loading it then says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trident_llm.errors import BadRequest, NotFound, TridentError

A_TENSOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B_TENSOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def config_with(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def tensors_with(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


def poisoned(tensors: dict[str, torch.Tensor]) -> None:
    tensors[B_TENSOR][3, 1] = float("nan")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def cut_short(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


REFUSED: dict[str, tuple[Callable[[Path], Any], type[TridentError], str]] = {
    "nan": (tensors_with(poisoned), BadRequest, rf"tensor '{B_TENSOR}' holds values that are not finite"),
    "overflow": (config_with(lora_alpha=1e42), BadRequest, "beyond the range"),
    "integers": (
        tensors_with(lambda tensors: tensors.update({A_TENSOR: tensors[A_TENSOR].to(torch.int32)})), BadRequest,
        "not finite numbers",
    ),
    "wrong-base": (
        tensors_with(lambda tensors: tensors.update({A_TENSOR: torch.zeros(4, 100)})), BadRequest,
        r"lora_A of model.layers.0.self_attn.q_proj has shape \[4, 100\]; .* say \[4, 64\]",
    ),
    "wrong-rank": (config_with(r=5), BadRequest, r"has shape \[4, \d+\]; .*rank 5"),
    "rank-above": (config_with(r=9), BadRequest, r"rank 9 of .* is above max_lora_rank \(8\)"),
    "half-missing": (tensors_with(lambda tensors: tensors.pop(B_TENSOR)), BadRequest, "lora_B of .* is missing"),
    "too-deep": (
        tensors_with(lambda tensors: tensors.update({A_TENSOR.replace("layers.0", "layers.7"): torch.zeros(4, 64)})),
        BadRequest, "model.layers.7.self_attn.q_proj is no module of the base model",
    ),
    "embedding": (
        tensors_with(lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": torch.zeros(4)})),
        BadRequest, "tensor 'base_model.model.model.embed_tokens.weight' is not supported",
    ),
    "no-magnitudes": (config_with(use_dora=True), BadRequest, "lora_magnitude_vector of .* is missing"),
    "modules-to-save": (config_with(modules_to_save=["lm_head"]), BadRequest, "modules_to_save is set"),
    "bias": (config_with(bias="all"), BadRequest, "bias 'all' is not supported"),
    "lora-bias": (config_with(lora_bias=True), BadRequest, "lora_bias is set"),
    "other-method": (config_with(peft_type="LOHA"), BadRequest, "peft_type 'LOHA' is not supported"),
    "rank-zero": (config_with(r=0), BadRequest, "a rank of 0 is not an integer of at least 1"),
    "no-json": (lambda folder: (folder / "adapter_config.json").write_text("{"), BadRequest, "cannot be read"),
    "a-list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), BadRequest, "no JSON object"),
    "no-config": (lambda folder: (folder / "adapter_config.json").unlink(), NotFound, "no adapter_config.json"),
    "no-weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), NotFound, "no adapter_model"),
    "pickle": (pickled, BadRequest, r"weights are pickled \(adapter_model.bin\); loading such a file can run any code"),
    "cut-short": (cut_short, BadRequest, "adapter_model.safetensors cannot be read"),
}  # fmt: skip
