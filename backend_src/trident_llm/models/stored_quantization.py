"""StoredQuantization: how a checkpoint's weights are quantized, from quantization_config in config.json.

AWQ (AutoAWQ, gemm layout), GPTQ (AutoGPTQ, GPTQModel) and compressed-tensors; anything else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import LoadFailed
from ..kernels.quantized_weight import BITS, Activations

Layout = Literal["awq", "gptq", "compressed-tensors"]
Error = Callable[[str, str], LoadFailed]
"""From the name of a field and a problem to the error that also names the file."""

_COMPRESSED_FORMATS = (
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
)
_STRATEGIES = ("tensor", "channel", "group")
_KEY = "quantization_config"


@dataclass(frozen=True)
class WeightFormat:
    """What the tensors of a quantized linear layer mean, as far as their shapes and dtypes do not tell."""

    bits: int
    activations: Activations
    zero_offset: int = 0
    """What was taken from stored zero points."""


@dataclass(frozen=True)
class StoredQuantization:
    """Formats by target: a name, "re:" and a regular expression, or "Linear" for all linear layers."""

    layout: Layout
    formats: tuple[tuple[str, WeightFormat], ...]

    def format_of(self, module: str) -> WeightFormat | None:
        """The format of a module's weight: names win over expressions, these over "Linear"."""
        tests: tuple[Callable[[str], bool], ...] = (
            lambda target: target == module,
            lambda target: target.startswith("re:") and re.match(target[3:], module) is not None,
            lambda target: target == "Linear",
        )
        for matches in tests:
            for target, weight_format in self.formats:
                if matches(target):
                    return weight_format
        return None


def read_stored_quantization(values: Mapping[str, Any], error: Error) -> StoredQuantization:
    """values: quantization_config. Raises what ``error`` makes of a field and its problem."""
    reader = _Reader(values, _KEY, error)
    method = reader.choice("quant_method", tuple(_METHODS))
    return _METHODS[method](reader)


@dataclass(frozen=True)
class _Reader:
    """A JSON object whose fields are checked as they are read."""

    values: Mapping[str, Any]
    path: str
    make_error: Error

    def error(self, name: str, problem: str) -> LoadFailed:
        return self.make_error(f"{self.path}.{name}", problem)

    def choice(self, name: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        value = self.values.get(name, default)
        value = value.lower() if isinstance(value, str) else value
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            shown = ", ".join(str(choice) for choice in allowed if choice is not None)
            raise self.error(name, f"{value!r} is not supported; supported: {shown}")
        return value

    def object(self, name: str) -> _Reader | None:
        """None where it is missing, null or empty."""
        value = self.values.get(name)
        if not value:
            return None
        if not isinstance(value, Mapping):
            raise self.error(name, f"{value!r} is not an object")
        return _Reader(value, f"{self.path}.{name}", self.make_error)

    def refuse(self, name: str, reason: str) -> None:
        if self.values.get(name):
            raise self.error(name, f"{self.values[name]!r} is not supported; {reason}")


def _awq(reader: _Reader) -> StoredQuantization:
    reader.choice("version", ("gemm",), "gemm")
    reader.choice("zero_point", (True,), True)
    bits = reader.choice("w_bit" if "w_bit" in reader.values else "bits", (4,))
    return StoredQuantization("awq", (("Linear", WeightFormat(bits, "none")),))


def _gptq(reader: _Reader) -> StoredQuantization:
    reader.refuse("dynamic", "one format for all layers is")
    bits = reader.choice("bits", (4, 8))
    form = reader.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    return StoredQuantization("gptq", (("Linear", WeightFormat(bits, "none", 1 if form == "gptq" else 0)),))


def _compressed_tensors(reader: _Reader) -> StoredQuantization:
    reader.choice("format", _COMPRESSED_FORMATS, "dense")
    reader.refuse("kv_cache_scheme", "the setting kv_cache_dtype quantizes the cache")
    sparsity = reader.object("sparsity_config")
    if sparsity is not None:
        sparsity.choice("format", ("dense",), "dense")
    groups = reader.object("config_groups")
    if groups is None:
        raise reader.error("config_groups", "missing")
    formats: list[tuple[str, WeightFormat]] = []
    for name in groups.values:
        group = groups.object(name)
        if group is None:
            raise groups.error(name, "missing")
        targets = group.values.get("targets")
        if not isinstance(targets, list) or not all(map(_is_target, targets)):
            raise group.error("targets", f"{targets!r} is no list of names and regular expressions")
        weight_format = _compressed_format(group)
        formats += [(target, weight_format) for target in targets]
    return StoredQuantization("compressed-tensors", tuple(formats))


def _is_target(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        re.compile(value.removeprefix("re:"))
    except re.error:
        return False
    return True


def _compressed_format(group: _Reader) -> WeightFormat:
    group.choice("format", (*_COMPRESSED_FORMATS, None))
    group.refuse("output_activations", "outputs stay in the model's dtype")
    weights = group.object("weights")
    if weights is None:
        raise group.error("weights", "missing")
    kind = weights.choice("type", ("int", "float"), "int")
    bits = weights.choice("num_bits", BITS if kind == "int" else (8,))
    weights.choice("strategy", (*_STRATEGIES, None))
    activations = group.object("input_activations")
    if activations is None:
        return WeightFormat(bits, "none")
    activations.choice("num_bits", (8,))
    activations.choice("symmetric", (True,), True)
    if bits != 8 or activations.choice("type", ("int", "float"), "int") != kind:
        raise activations.error("type", f"activations in 8 bits beside weights in {bits} bits of type {kind}")
    return WeightFormat(bits, "int8" if kind == "int" else "fp8")


_METHODS: Mapping[str, Callable[[_Reader], StoredQuantization]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
}
