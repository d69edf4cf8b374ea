"""QuantizedCheckpoint: a safetensors checkpoint whose linear layers are stored as integers, scales and zero points.

To its reader it looks like any other checkpoint: one tensor per parameter, some of which are QuantizedWeights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..kernels.quantized_weight import Activations, QuantizedWeight
from .checkpoint import FLOATS, SafetensorsCheckpoint, StoredTensor
from .quantized_layouts import Parts, read_awq, read_compressed, read_gptq, words_of
from .stored_quantization import StoredQuantization, WeightFormat

_MAIN = {"awq": "qweight", "gptq": "qweight", "compressed-tensors": "weight_packed"}
_OTHERS = {
    "awq": ("qzeros", "scales"),
    "gptq": ("qzeros", "scales", "g_idx"),
    "compressed-tensors": ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale"),
}
"""Tensors beside the main one. Static input_scales are left: the kernels find a scale for every token."""
_LAYOUTS = {"awq": read_awq, "gptq": read_gptq, "compressed-tensors": read_compressed}
_WHOLE = ("I8", "F8_E4M3")
"""Dtypes of weights that compressed-tensors stores unpacked, under their own names."""


@dataclass(frozen=True)
class StoredWeight:
    """What the headers tell of a quantized weight."""

    bits: int
    group_size: int
    activations: Activations
    symmetric: bool
    """Whether no zero points are stored."""


class QuantizedCheckpoint:
    """Shapes are those of the weights that the stored tensors stand for.

    expected: shapes of the model's parameters. Raises ``LoadFailed`` naming tensor and problem.
    """

    def __init__(
        self,
        stored: SafetensorsCheckpoint,
        quantization: StoredQuantization,
        expected: Mapping[str, tuple[int, ...]],
        device: torch.device | str,
    ) -> None:
        self._stored = stored
        self._layout = quantization.layout
        self._device = device
        self._parts: dict[str, dict[str, StoredTensor]] = {}
        self._formats: dict[str, WeightFormat] = {}
        by_name = {tensor.name: tensor for tensor in stored.tensors}
        mains = [tensor for tensor in stored.tensors if self._is_main(tensor)]
        for tensor in mains:
            module = tensor.name.rpartition(".")[0]
            weight_format = quantization.format_of(module)
            if weight_format is None:
                raise tensor.error("is quantized, but quantization_config has no group for it")
            others = {leaf: by_name.get(f"{module}.{leaf}") for leaf in _OTHERS[self._layout]}
            self._formats[module] = weight_format
            self._parts[module] = {leaf: part for leaf, part in others.items() if part is not None}
        parameters = [self._parameter(tensor, expected) for tensor in stored.tensors]
        self.tensors = [tensor for tensor in parameters if tensor and not self._is_empty_bias(tensor, expected)]

    def read(self, tensor: StoredTensor) -> Tensor | QuantizedWeight:
        """A weight as it is stored, on the device; anything else as a checkpoint reads it."""
        module = tensor.name.rpartition(".")[0]
        if module not in self._parts or not tensor.name.endswith(".weight"):
            return self._stored.read(tensor)
        tensors = {leaf: self._stored.read(part).to(self._device) for leaf, part in self._parts[module].items()}
        main = self._stored.read(tensor).to(self._device)
        parts = Parts(main, tensors, tensor.shape, self._formats[module], tensor.error)
        return _LAYOUTS[self._layout](parts)

    def stored_weights(self) -> dict[str, StoredWeight]:
        """The weights that are still quantized when they have been read, by name, from headers alone."""
        found = {}
        for tensor in self.tensors:
            module, _, leaf = tensor.name.rpartition(".")
            if leaf != "weight" or module not in self._parts:
                continue
            # A float8 weight whose inputs stay as they are comes dequantized.
            if tensor.dtype != "F8_E4M3" or self._formats[module].activations != "none":
                found[tensor.name] = self._stored_weight(tensor, module)
        return found

    def _stored_weight(self, tensor: StoredTensor, module: str) -> StoredWeight:
        parts = self._parts[module]
        scales = parts.get("weight_scale" if self._layout == "compressed-tensors" else "scales")
        if scales is None:
            raise tensor.error("has no scales beside it")
        per_output = len(scales.shape) < 2 or prod(scales.shape) == 1
        num_groups = 1 if per_output else scales.shape[1 if self._layout == "compressed-tensors" else 0]
        weight_format = self._formats[module]
        return StoredWeight(
            bits=weight_format.bits,
            group_size=tensor.shape[1] // num_groups,
            activations=weight_format.activations,
            symmetric=not {"qzeros", "weight_zero_point"} & parts.keys(),
        )

    def _is_main(self, tensor: StoredTensor) -> bool:
        leaf = tensor.name.rpartition(".")[2]
        whole = self._layout == "compressed-tensors" and leaf == "weight" and tensor.dtype in _WHOLE
        return whole or leaf == _MAIN[self._layout]

    def _parameter(self, tensor: StoredTensor, expected: Mapping[str, tuple[int, ...]]) -> StoredTensor | None:
        """The parameter that a stored tensor is; None for what merely belongs to one."""
        module, _, leaf = tensor.name.rpartition(".")
        if module in self._parts and leaf in _OTHERS[self._layout]:
            return None
        if module in self._parts and self._is_main(tensor):
            if len(tensor.shape) != 2:
                raise tensor.error(f"has shape {list(tensor.shape)}; a matrix was expected")
            name = f"{module}.weight"
            shape = self._weight_shape(tensor, self._formats[module].bits, expected.get(name, ()))
            return StoredTensor(name, tensor.stored_name, shape, tensor.file, tensor.dtype)
        if tensor.dtype not in FLOATS:
            raise tensor.error(f"dtype {tensor.dtype} is not supported; supported: {', '.join(FLOATS)}")
        return tensor

    def _weight_shape(self, tensor: StoredTensor, bits: int, expected: tuple[int, ...]) -> tuple[int, ...]:
        """expected: decides which of several numbers of inputs fill as many words as there are."""
        rows, columns = tensor.shape
        if self._layout == "awq":
            return columns * 32 // bits, rows
        if self._layout == "gptq":
            return columns, rows * 32 // bits
        if tensor.dtype in _WHOLE:
            return rows, columns
        if len(expected) == 2 and expected[0] == rows and columns in words_of(expected[1], bits):
            return expected
        return rows, columns * 32 // bits

    def _is_empty_bias(self, tensor: StoredTensor, expected: Mapping[str, tuple[int, ...]]) -> bool:
        """AutoGPTQ writes biases of zeros for layers that have none."""
        module, _, leaf = tensor.name.rpartition(".")
        unexpected = leaf == "bias" and module in self._parts and tensor.name not in expected
        return unexpected and not bool(self._stored.read(tensor).any())
