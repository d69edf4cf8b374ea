"""How each linear layer is quantized: the settings, the rules of ``isq_layers``, and what a model makes of them.

Everything a user can get wrong in these settings is refused here, from the model's shape alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import BadRequest
from ..models.model_config import ModelConfig
from .modules import HEAD, Module, model_modules

GROUP_SIZES = (128, 64, 32)
CHANNEL = "channel"
"""The group size of a whole row."""
NONE = "none"
METHOD_BITS: Mapping[str, tuple[int, ...]] = {
    "rtn": (4, 5, 6, 8),
    "awq": (4, 5, 6, 8),
    "gptq": (4, 5, 6, 8),
    "smoothquant": (8,),
    "fp8": (8,),
}
"""The first is the default."""
EIGHT_BIT_ACTIVATIONS = ("smoothquant", "fp8")
"""Methods whose weights have one scale per output."""
FULL_BITS = 16
_HEAD_RULE = f"{HEAD}=rtn:8"
"""A head's error goes straight into the logits, and 8 bits halve what it costs."""


@dataclass(frozen=True)
class LinearScheme:
    """How one linear layer is quantized."""

    method: str
    bits: int
    group_size: int
    """Inputs that share a scale; all of them for a scale per output."""

    @property
    def symmetric(self) -> bool:
        """With 256 steps a zero point gains nothing that its memory is worth."""
        return self.bits == 8

    @property
    def bits_per_weight(self) -> float:
        """Scales (16 bits) and zero points (8 bits) included."""
        return self.bits + (16 if self.symmetric else 24) / self.group_size

    def __str__(self) -> str:
        group = "" if self.method in EIGHT_BIT_ACTIVATIONS else f", group {self.group_size}"
        return f"{self.method} {self.bits} bits{group}"


Plan = Mapping[str, LinearScheme | None]
"""The scheme of every linear layer by name, in the order of the forward pass; None: it stays in full precision."""


@dataclass(frozen=True)
class QuantizationSettings:
    """The settings ``isq_*`` that say what is done."""

    method: str = NONE
    bits: int | None = None
    """None: the method's default."""
    group_size: str = "auto"
    layers: str = ""

    @property
    def enabled(self) -> bool:
        return self.method != NONE or bool(self.layers)


@dataclass(frozen=True)
class _Rule:
    text: str
    target: str
    method: str
    bits: int | None
    group_size: str | None


def make_plan(settings: QuantizationSettings, config: ModelConfig) -> Plan:
    """Raises ``BadRequest`` naming the setting, its value and what is allowed."""
    if settings.method == NONE and settings.bits is not None:
        raise BadRequest(f"isq_bits: {settings.bits} is set, but isq_method is none; choose one of {_methods()}")
    modules = model_modules(config)
    auto = _auto_group_size(modules)
    base = _Rule("isq_method", "", settings.method, settings.bits, settings.group_size)
    plan = {
        module.name: _scheme("isq_bits", "isq_group_size", base, module, auto)
        for module in modules
        if module.name != HEAD
    }
    head_rule = parse_rules(_HEAD_RULE)[0] if settings.method != NONE else base
    plan[HEAD] = _scheme("isq_bits", "isq_group_size", _in_groups_of(head_rule, settings), modules[-1], auto)
    for rule in parse_rules(settings.layers):
        matched = [module for module in modules if _matches(rule, module)]
        if not matched:
            raise BadRequest(
                f"isq_layers: rule {rule.text!r} matches no layer; the model has layers "
                f"0-{config.num_hidden_layers - 1} of {', '.join(map(_short_name, modules[:4]))}, and {HEAD}"
            )
        for module in matched:
            plan[module.name] = _scheme("isq_layers", "isq_layers", _in_groups_of(rule, settings), module, auto)
    return plan


def pinned_modules(settings: QuantizationSettings, config: ModelConfig) -> frozenset[str]:
    """Names of the layers that a rule is about, and the head: no search changes these."""
    rules = parse_rules(settings.layers)
    named = [module.name for module in model_modules(config) if any(_matches(rule, module) for rule in rules)]
    return frozenset([*named, HEAD])


def average_bits(plan: Plan, config: ModelConfig) -> float:
    """Bits per weight of the decoder layers, scales and zero points included; 16 where one is not quantized."""
    total = num_weights = 0.0
    for module in model_modules(config):
        scheme, size = plan[module.name], module.num_inputs * module.num_outputs
        if module.name != HEAD:
            total += size * (FULL_BITS if scheme is None else scheme.bits_per_weight)
            num_weights += size
    return total / num_weights


def parse_rules(text: str) -> list[_Rule]:
    """``TARGET=METHOD[:BITS[:GROUP]]; ...``, TARGET a layer, a range of layers, or a regular expression."""
    rules = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        target, _, wanted = part.rpartition("=")
        method, *numbers = [word.strip() for word in wanted.split(":")]
        if not target.strip() or method not in (*METHOD_BITS, NONE) or len(numbers) > 2:
            raise BadRequest(
                f"isq_layers: {part!r} is no rule; give LAYERS=METHOD:BITS:GROUP, with LAYERS a number, a range as 0-3 "
                f"or a regular expression, METHOD one of {_methods()}, none, and BITS and GROUP where they differ from "
                "the default"
            )
        if method == NONE and numbers:
            raise BadRequest(f"isq_layers: {part!r}: none has neither bits nor groups")
        bits, group_size, *_ = *numbers, "", ""
        if bits and not bits.isdecimal():
            raise BadRequest(f"isq_layers: {part!r}: bits {bits!r} is not one of {_bits(method)}")
        _check_pattern(part, target.strip())
        rules.append(_Rule(part, target.strip(), method, int(bits) if bits else None, group_size or None))
    return rules


def _check_pattern(part: str, target: str) -> None:
    try:
        re.compile(target)
    except re.error as error:
        raise BadRequest(f"isq_layers: {part!r}: {target!r} is not a regular expression: {error}") from None


def _matches(rule: _Rule, module: Module) -> bool:
    """Whether a rule is about a layer. Raises ``BadRequest`` for one about a part of a merged layer."""
    layers = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", rule.target)
    if layers:
        first, last = int(layers[1]), int(layers[2] or layers[1])
        return module.layer is not None and first <= module.layer <= last
    if re.fullmatch(rule.target, module.name):
        return True
    parts = [bool(re.fullmatch(rule.target, part)) for part in module.parts]
    if any(parts) and not all(parts) and module.layer is not None:
        raise BadRequest(
            f"isq_layers: rule {rule.text!r} matches some of {', '.join(module.parts)}, which are one layer "
            f"({module.name}); match all of them or none"
        )
    return all(parts) and module.layer is not None


def _in_groups_of(rule: _Rule, settings: QuantizationSettings) -> _Rule:
    """The rule with the group size of ``isq_group_size`` where it names none and its method has groups."""
    if rule.group_size is not None or rule.method in EIGHT_BIT_ACTIVATIONS:
        return rule
    return _Rule(rule.text, rule.target, rule.method, rule.bits, settings.group_size)


def _scheme(bits_key: str, group_key: str, rule: _Rule, module: Module, auto: int | None) -> LinearScheme | None:
    if rule.method == NONE:
        return None
    bits = METHOD_BITS[rule.method][0] if rule.bits is None else rule.bits
    if bits not in METHOD_BITS[rule.method]:
        raise BadRequest(f"{bits_key}: {rule.method} has no {bits} bits; allowed: {_bits(rule.method)}{_of(rule)}")
    return LinearScheme(rule.method, bits, _group_size(group_key, rule, module, auto))


def _group_size(key: str, rule: _Rule, module: Module, auto: int | None) -> int:
    text = rule.group_size or "auto"
    if rule.method in EIGHT_BIT_ACTIVATIONS:
        if text not in ("auto", CHANNEL):
            raise BadRequest(f"{key}: {rule.method} has one scale per output; {text} is not allowed{_of(rule)}")
        return module.num_inputs
    if text == CHANNEL:
        return module.num_inputs
    if text == "auto":
        if auto is None:
            raise BadRequest(
                f"{key}: auto finds no size among {_sizes()} that divides the inputs of every layer "
                f"({module.name} has {module.num_inputs}); give channel{_of(rule)}"
            )
        return auto
    if not text.isdecimal() or int(text) not in GROUP_SIZES:
        raise BadRequest(f"{key}: group size {text!r} is not one of auto, {_sizes()}, {CHANNEL}{_of(rule)}")
    if module.num_inputs % int(text):
        fitting = [str(size) for size in GROUP_SIZES if module.num_inputs % size == 0]
        raise BadRequest(
            f"{key}: group size {text} does not divide the {module.num_inputs} inputs of {module.name}; "
            f"allowed: {', '.join(['auto', *fitting, CHANNEL])}{_of(rule)}"
        )
    return int(text)


def _auto_group_size(modules: list[Module]) -> int | None:
    """The largest size that divides every input width."""
    return next((size for size in GROUP_SIZES if all(module.num_inputs % size == 0 for module in modules)), None)


def _of(rule: _Rule) -> str:
    return f" (rule {rule.text!r})" if rule.target else ""


def _methods() -> str:
    return ", ".join(METHOD_BITS)


def _bits(method: str) -> str:
    return ", ".join(map(str, METHOD_BITS.get(method, ())))


def _sizes() -> str:
    return ", ".join(map(str, GROUP_SIZES))


def _short_name(module: Module) -> str:
    return module.name.split(".", 3)[-1]
