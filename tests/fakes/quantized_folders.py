"""Quantized checkpoints written from their formats' definitions, field by field, beside the weights they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.fakes.tiny_models import write_tiny_llama

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Field i of a word holds output AWQ_ORDER[i] of eight."""


@dataclass
class Integers:
    """A layer as integers: value = (codes - zeros[:, groups]) * scales[:, groups]."""

    codes: np.ndarray
    """[out, in] from 0 to 2**bits - 1."""
    zeros: np.ndarray
    """[out, G]."""
    scales: np.ndarray
    """[out, G] float16."""
    groups: np.ndarray
    """[in], the group of each input."""
    bits: int

    def weight(self) -> torch.Tensor:
        values = (self.codes - self.zeros[:, self.groups]) * self.scales.astype(np.float32)[:, self.groups]
        return torch.from_numpy(values.astype(np.float32))


def round_layer(
    weight: torch.Tensor, bits: int, group_size: int, *, symmetric: bool = False, shuffle: int | None = None
) -> Integers:
    """shuffle: a seed by which the inputs are spread over the groups."""
    values = weight.double().numpy()
    num_inputs = values.shape[1]
    groups = np.arange(num_inputs) // group_size
    if shuffle is not None:
        groups = np.random.default_rng(shuffle).permutation(groups)
    low = np.stack([values[:, groups == g].min(1) for g in range(groups.max() + 1)], 1).clip(max=0)
    high = np.stack([values[:, groups == g].max(1) for g in range(groups.max() + 1)], 1).clip(min=0)
    middle, top = 2 ** (bits - 1), 2**bits - 1
    steps = np.maximum(-low, high) / (middle - 1) if symmetric else (high - low) / top
    scales = steps.astype(np.float16)
    steps = scales.astype(np.float64)
    zeros = np.full_like(steps, middle) if symmetric else np.rint(-low / steps).clip(0, top)
    codes = np.rint(values / steps[:, groups] + zeros[:, groups]).clip(0, top)
    return Integers(codes.astype(np.int64), zeros.astype(np.int64), scales, groups, bits)


def pack_rows(fields: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """fields [R, C] -> [R, C * bits / 32] int32: field order[i] of a word's fields at its bits bits * i and up."""
    count = 32 // bits
    words = np.zeros((fields.shape[0], fields.shape[1] // count), dtype=np.uint32)
    for column in range(words.shape[1]):
        for i, field in enumerate(order or range(count)):
            words[:, column] |= fields[:, column * count + field].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(words.view(np.int32).copy())


def pack_stream(fields: np.ndarray, bits: int) -> torch.Tensor:
    """fields [R, C] -> [R, ceil(C * bits / 32)] int32, without gaps."""
    rows = []
    for row in fields:
        number = sum(int(field) << (bits * i) for i, field in enumerate(row))
        size = -(-len(row) * bits // 32) * 4
        rows.append(np.frombuffer(number.to_bytes(size, "little"), dtype=np.int32))
    return torch.from_numpy(np.stack(rows).copy())


def awq_tensors(layer: Integers) -> dict[str, torch.Tensor]:
    return {
        "qweight": pack_rows(layer.codes.T, 4, AWQ_ORDER),
        "qzeros": pack_rows(layer.zeros.T, 4, AWQ_ORDER),
        "scales": torch.from_numpy(layer.scales.T.copy()),
    }


def gptq_tensors(layer: Integers, *, less: int) -> dict[str, torch.Tensor]:
    """less: 1 in the first version of the format."""
    stored = (layer.zeros.T - less) % 2**layer.bits
    return {
        "qweight": pack_rows(layer.codes, layer.bits).t().contiguous(),
        "qzeros": pack_rows(stored, layer.bits),
        "scales": torch.from_numpy(layer.scales.T.copy()),
        "g_idx": torch.from_numpy(layer.groups.astype(np.int32)),
    }


def packed_tensors(layer: Integers, *, symmetric: bool) -> dict[str, torch.Tensor]:
    """compressed-tensors, pack-quantized."""
    tensors = {
        "weight_packed": pack_stream(layer.codes, layer.bits),
        "weight_scale": torch.from_numpy(layer.scales.copy()),
        "weight_shape": torch.tensor(layer.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_stream(layer.zeros.T, layer.bits).t().contiguous()
    return tensors


def int_tensors(layer: Integers) -> dict[str, torch.Tensor]:
    """compressed-tensors, int-quantized; zero points only where one is not the middle."""
    codes = torch.from_numpy((layer.codes - 128).astype(np.int8))
    tensors = {"weight": codes, "weight_scale": torch.from_numpy(layer.scales.copy())}
    if (layer.zeros != 128).any():
        tensors["weight_zero_point"] = torch.from_numpy((layer.zeros - 128).astype(np.int8))
    return tensors


@dataclass(frozen=True)
class Folders:
    quantized: Path
    dense: Path
    """The same model with the weights that the integers stand for, in float32."""


def write_quantized(
    root: Path,
    quantization: dict[str, Any],
    store: Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]],
    **model: Any,
) -> Folders:
    """store: from a projection's full name and its weight to what is stored and what that stands for."""
    dense = write_tiny_llama(root / "dense", **{"hidden": 64, **model})
    folder = root / "quantized"
    shutil.copytree(dense, folder)
    tensors = load_file(dense / "model.safetensors")
    stored, plain = {}, dict(tensors)
    for name, values in tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.rpartition(".")[2] in PROJECTIONS:
            parts, plain[name] = store(module, values)
            stored |= {f"{module}.{leaf}": part.contiguous() for leaf, part in parts.items()}
        else:
            stored[name] = values
    save_file({name: values.contiguous() for name, values in plain.items()}, dense / "model.safetensors")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    return Folders(folder, dense)
