"""Puts parameters into a decoder one by one, named after its own layers, which merge some of the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..kernels.quantized_weight import QuantizedWeight
from ..models.layers import Linear
from ..models.llama import LlamaDecoder
from ..models.weights import WeightReader
from .modules import HEAD, model_modules

Parameter = Tensor | QuantizedWeight
EMBEDDING = "model.embed_tokens.weight"
HEAD_WEIGHT = f"{HEAD}.weight"


class Installer:
    """Takes each parameter once. What it was not given it reads from the checkpoint in the end.

    Names are those of a checkpoint, or of a merged layer: model.layers.0.self_attn.qkv_proj.weight. Linear layers
    also take ``input_scales`` and ``output_scales``.
    """

    def __init__(self, decoder: LlamaDecoder) -> None:
        self._head = decoder.head
        self._tied = decoder.config.tie_word_embeddings
        merged = {module.parts: module.name for module in model_modules(decoder.config)}
        self._parts: dict[str, tuple[str, ...]] = {}
        self._installs: dict[str, Callable[[Any], None]] = {}
        for target in decoder.weight_targets():
            owners = tuple(part.rpartition(".")[0] for part in target.parts)
            name = next(iter(target.parts))
            if len(owners) > 1:
                name = f"{merged[owners]}.{name.rpartition('.')[2]}"
            self._parts[name] = tuple(target.parts)
            self._installs[name] = target.install
        for adaptable in decoder.adaptable_linears():
            name = merged[tuple(adaptable.parts)]
            self._installs[f"{name}.input_scales"] = _setter(adaptable.linear, "input_scales")
            self._installs[f"{name}.output_scales"] = _setter(adaptable.linear, "output_scales")

    def install(self, name: str, value: Parameter) -> None:
        """A tied head may be set too, once the embedding is there: it then no longer shares that one's weight."""
        if name == HEAD_WEIGHT and self._tied:
            assert EMBEDDING not in self._installs
            self._head.set_weight(value)
        else:
            self._installs.pop(name)(value)

    def install_all(self, parameters: Iterable[tuple[str, Parameter]]) -> None:
        for name, value in parameters:
            self.install(name, value)

    def install_rest(self, reader: WeightReader) -> None:
        """Set what is missing to the checkpoint's values."""
        for name, parts in self._parts.items():
            if name in self._installs:
                self.install(name, torch.cat([reader.read(part) for part in parts]))


def _setter(linear: Linear, attribute: str) -> Callable[[Tensor], None]:
    return lambda value: setattr(linear, attribute, value)
