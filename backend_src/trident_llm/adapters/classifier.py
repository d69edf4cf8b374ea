"""The classifier of an X-LoRA mix: from the base model's last hidden states to the scalings of adapters by module."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BadRequest, NotFound
from .adapter_file import WEIGHTS_FILE
from .xlora_config import CLASSIFIER_FILE, XLoraConfig

MODULES_PER_LAYER = 7
"""q, k, v, o, gate, up and down."""

_TENSOR = re.compile(r"(?:.*internal_xlora_classifier\.layers|inner)\.([0-9]+)\.(weight|bias)|(last)\.(weight|bias)")


@dataclass(frozen=True)
class Classifier:
    """Linear layers, with ReLU between them where the config says so."""

    weights: tuple[Tensor, ...]
    """Each [out, in]."""
    biases: tuple[Tensor | None, ...]
    config: XLoraConfig
    module_rows: Tensor
    """[M] int64: the row of the classifier's output that each module of the model takes."""
    module_layers: Tensor
    """[M] int64: the layer of each module."""
    is_updated: Tensor
    """[M] float32: 1 for modules that some member updates."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> [N, modules or 1, adapters] float32."""
        x = hidden
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if index and self.config.relu:
                x = F.relu(x)
            x = F.linear(x, weight, bias)
        return x.float().view(len(hidden), -1, len(self.config.adapters))

    def scalings(self, hidden: Tensor, temperatures: Tensor, top_k: Tensor) -> Tensor:
        """hidden [N, H] -> [N, modules or 1, adapters] float32, the mix's global weight left out.

        temperatures: [N]; top_k: [N] int64, at least 1. Softmax and top-k as PEFT's XLoraLayer has them.
        """
        scalings = self.logits(hidden)
        if self.config.softmax:
            scalings = torch.softmax(scalings / temperatures[:, None, None], -1)
        return self.select(scalings, top_k)

    def select(self, scalings: Tensor, top_k: Tensor) -> Tensor:
        """Keep the ``top_k`` largest of each row; see ``scalings``."""
        order = scalings.argsort(stable=True, dim=-1, descending=True)
        place = order.argsort(-1)
        scalings = scalings * (place < top_k[:, None, None])
        if self.config.softmax_topk:
            kept = scalings != 0
            scalings = torch.softmax(scalings.masked_fill(~kept, float("-inf")), -1).masked_fill(~kept, 0.0)
        return scalings


    def by_layer(self, scalings: Tensor) -> Tensor:
        """[modules or 1, adapters] -> [layers, adapters]: averaged over the modules that are updated; 0 without any."""
        each = scalings.index_select(0, self.module_rows) * self.is_updated[:, None]
        num_layers = int(self.module_layers.shape[0]) // MODULES_PER_LAYER
        sums = each.new_zeros(num_layers, each.shape[1]).index_add_(0, self.module_layers, each)
        counts = self.is_updated.new_zeros(num_layers).index_add_(0, self.module_layers, self.is_updated)
        return sums / counts.clamp(min=1)[:, None]


def read_classifier(
    folder: Path, config: XLoraConfig, what: str, *, modules: Sequence[str], updated: Sequence[str],
    dtype: torch.dtype, device: torch.device,
) -> Classifier:  # fmt: skip
    """Read and check the classifier beside a config. ``modules``: of the model, in the order of the computation;
    ``updated``: those that members update.

    Raises ``NotFound`` or ``BadRequest`` that begins with ``what``.
    """
    layers = _layers(folder, what)
    shapes = _shapes(config, len(updated))
    if len(layers) != len(shapes):
        raise BadRequest(f"{what}: the classifier has {len(layers)} layers; xlora_depth says {len(shapes)}")
    for number, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        for kind, wanted in (("weight", shape), ("bias", shape[:1])):
            if kind in layer and tuple(layer[kind].shape) != wanted:
                found = list(layer[kind].shape)
                raise BadRequest(
                    f"{what}: the {kind} of the classifier's layer {number} has shape {found}; config and adapters say "
                    f"{list(wanted)}"
                )
        if "weight" not in layer:
            raise BadRequest(f"{what}: layer {number} of the classifier has no weight")
    return Classifier(
        weights=tuple(layer["weight"].to(device, dtype) for layer in layers),
        biases=tuple(layer["bias"].to(device, dtype) if "bias" in layer else None for layer in layers),
        config=config,
        module_rows=torch.tensor(
            [updated.index(name) if config.layerwise and name in updated else 0 for name in modules], device=device
        ),
        module_layers=torch.arange(len(modules), device=device) // MODULES_PER_LAYER,
        is_updated=torch.tensor([float(name in updated) for name in modules], device=device),
    )


def _layers(folder: Path, what: str) -> list[dict[str, Tensor]]:
    """weight and bias of each linear layer, in order."""
    path = folder / (CLASSIFIER_FILE if (folder / CLASSIFIER_FILE).is_file() else WEIGHTS_FILE)
    if not path.is_file():
        raise NotFound(f"{what}: no {CLASSIFIER_FILE} in its folder")
    found: dict[float, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                match = _TENSOR.fullmatch(name)
                if match is None:
                    raise BadRequest(f"{what}: tensor {name[:200]!r} is not part of an X-LoRA classifier")
                place = float("inf") if match[3] else int(match[1])
                found.setdefault(place, {})[match[2] or match[4]] = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadRequest(f"{what}: {path.name} cannot be read: {error}") from None
    for layer in found.values():
        for tensor in layer.values():
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise BadRequest(f"{what}: the classifier holds values that are not finite numbers")
    return [found[place] for place in sorted(found)]


def _shapes(config: XLoraConfig, num_modules: int) -> list[tuple[int, int]]:
    outputs = len(config.adapters) * (num_modules if config.layerwise else 1)
    widths = [config.hidden_size, *[config.size] * (config.depth - 1), outputs]
    return [(after, before) for before, after in itertools.pairwise(widths)]
