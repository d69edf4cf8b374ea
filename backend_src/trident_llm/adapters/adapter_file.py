"""Reads one adapter in PEFT's format for a base model: checked, stacked as the model's layers are, scales included.

Safetensors only, never a pickle. Knows nothing of slots and names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BadRequest, NotFound
from ..models.layers import AdaptableLinear
from .dora import dora_gains
from .lora_config import CONFIG_FILE, LoraConfig, read_lora_config

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"

_TENSOR = re.compile(
    r"(?:[A-Za-z0-9_]+\.)*?(model\.layers\.[0-9]+\.(?:self_attn|mlp)\.[a-z]+_proj)\."
    r"(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)


@dataclass(frozen=True)
class LinearUpdate:
    """What an adapter adds to one linear layer of the model; see ``LoraLayer.set``."""

    a: Tensor
    """[P, r, in]; zeros for a part that the adapter leaves alone."""
    b: Tensor
    """[out, r], times the adapter's scale."""
    gains: Tensor | None
    """[out] float32: DoRA's factors minus 1; None without DoRA."""

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b) if self.gains is None else (self.a, self.b, self.gains)

    def pinned(self) -> LinearUpdate:
        gains = None if self.gains is None else self.gains.pin_memory()
        return LinearUpdate(self.a.pin_memory(), self.b.pin_memory(), gains)


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter in host memory."""

    updates: tuple[LinearUpdate | None, ...]
    """By linear layer of the model; None where the adapter changes nothing."""
    modules: frozenset[str]
    """Full names of the base model's modules that it updates."""
    rank: int
    """The largest."""
    uses_dora: bool

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for update in self.updates if update for tensor in update.tensors())

    def pinned(self) -> AdapterWeights:
        """The same in memory that a GPU copies from by itself."""
        return dataclasses.replace(self, updates=tuple(update and update.pinned() for update in self.updates))


@dataclass(frozen=True)
class AdapterTarget:
    """What adapters are read for."""

    linears: Sequence[AdaptableLinear]
    dtype: torch.dtype
    device: torch.device
    max_rank: int


def read_adapter(folder: Path, what: str, target: AdapterTarget) -> AdapterWeights:
    """Read and check a PEFT folder. Raises ``NotFound`` or ``BadRequest`` whose text begins with ``what``."""
    config = read_lora_config(folder / CONFIG_FILE, what)
    modules = _group(_read_tensors(folder, what), what)
    known = {name for linear in target.linears for name in linear.parts}
    for name in modules:
        if name not in known:
            raise BadRequest(f"{what}: {name} is no module of the base model that adapters can update")
    updates = []
    for linear in target.linears:
        present = {name: modules[name] for name in linear.parts if name in modules}
        updates.append(_update(linear, present, config, what, target) if present else None)
    return AdapterWeights(
        updates=tuple(updates),
        modules=frozenset(modules),
        rank=max(update.a.shape[1] for update in updates if update),
        uses_dora=config.use_dora,
    )


def check_not_pickled(folder: Path, what: str) -> None:
    """Raise ``BadRequest`` when the weights come as a pickle alone."""
    if (folder / PICKLED_FILE).exists() and not (folder / WEIGHTS_FILE).exists():
        raise BadRequest(
            f"{what}: its weights are pickled ({PICKLED_FILE}); loading such a file can run any code it contains. "
            "Save it again with PEFT's save_pretrained(..., safe_serialization=True)"
        )


def _read_tensors(folder: Path, what: str) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise NotFound(f"{what}: no {WEIGHTS_FILE} in its folder")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise BadRequest(f"{what}: {WEIGHTS_FILE} cannot be read: {error}") from None


def _group(tensors: Mapping[str, Tensor], what: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module by kind: lora_A, lora_B and, with DoRA, lora_magnitude_vector."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise BadRequest(
                f"{what}: tensor {name[:200]!r} is not supported; allowed: lora_A, lora_B and lora_magnitude_vector of "
                "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise BadRequest(f"{what}: tensor {name[:200]!r} holds values that are not finite numbers")
        kinds = modules.setdefault(match[1], {})
        if match[2] in kinds:
            raise BadRequest(f"{what}: {match[2]} of {match[1]} comes twice")
        kinds[match[2]] = tensor
    if not modules:
        raise BadRequest(f"{what}: {WEIGHTS_FILE} holds no tensors")
    return modules


def _update(
    linear: AdaptableLinear,
    modules: Mapping[str, Mapping[str, Tensor]],
    config: LoraConfig,
    what: str,
    target: AdapterTarget,
) -> LinearUpdate:
    """Stack the updates of a linear layer's parts. Parts that are missing, and missing ranks, are zeros."""
    for name, tensors in modules.items():
        _check_shapes(name, tensors, linear, config, what, target.max_rank)
    rank = max(config.rank_of(name) for name in modules)
    a = torch.zeros(len(linear.parts), rank, linear.num_inputs)
    b = torch.zeros(sum(linear.parts.values()), rank)
    magnitudes = torch.full((len(b),), float("nan"))
    first = 0
    for part, (name, size) in enumerate(linear.parts.items()):
        rows = slice(first, first + size)
        first += size
        if name in modules:
            own_rank = config.rank_of(name)
            a[part, :own_rank] = modules[name]["lora_A"]
            b[rows, :own_rank] = modules[name]["lora_B"].float() * config.scale_of(name)
            if config.use_dora:
                magnitudes[rows] = modules[name]["lora_magnitude_vector"].flatten()
    gains = None
    if config.use_dora:
        gains = dora_gains(linear, a.to(target.device), b.to(target.device), magnitudes.to(target.device), target.dtype)
        # The factor is on all of (W + B A) x.
        b *= 1 + gains[:, None]
    if linear.linear.input_scales is not None:
        a *= linear.linear.input_scales.cpu()
    if linear.linear.output_scales is not None:
        b /= linear.linear.output_scales.cpu()[:, None]
    return _finite(LinearUpdate(a.to(target.dtype), b.to(target.dtype), gains), next(iter(modules)), what, target)


def _check_shapes(
    name: str,
    tensors: Mapping[str, Tensor],
    linear: AdaptableLinear,
    config: LoraConfig,
    what: str,
    max_rank: int,
) -> None:
    rank, num_outputs = config.rank_of(name), linear.parts[name]
    if rank > max_rank:
        raise BadRequest(f"{what}: rank {rank} of {name} is above max_lora_rank ({max_rank})")
    wanted: dict[str, tuple[int, ...]] = {"lora_A": (rank, linear.num_inputs), "lora_B": (num_outputs, rank)}
    if config.use_dora:
        wanted["lora_magnitude_vector"] = (num_outputs,)
    if tensors.keys() != wanted.keys():
        odd = sorted(wanted.keys() ^ tensors.keys())[0]
        raise BadRequest(f"{what}: {odd} of {name} is {'missing' if odd in wanted else 'there, but use_dora is not'}")
    for kind, shape in wanted.items():
        found = tuple(tensors[kind].flatten().shape if len(shape) == 1 else tensors[kind].shape)
        if found != shape:
            raise BadRequest(
                f"{what}: {kind} of {name} has shape {list(found)}; the base model and rank {rank} say {list(shape)}"
            )


def _finite(update: LinearUpdate, name: str, what: str, target: AdapterTarget) -> LinearUpdate:
    """Scales, gains or a narrower dtype can take finite values beyond its range."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in update.tensors()):
        raise BadRequest(f"{what}: the update of {name} has values beyond the range of {target.dtype}")
    return update
