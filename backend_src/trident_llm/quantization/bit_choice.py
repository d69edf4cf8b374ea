"""``isq_max_loss``: bits for each layer, so that the loss stays within a bound at the least memory.

What a layer costs at other bits than those measured follows from the step of its grid: half the step, a quarter of the
squared error. Costs of layers add up to second order; whether they do is measured on the quantized model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..models.model_config import ModelConfig
from .modules import HEAD, Module, model_modules
from .scheme import FULL_BITS, METHOD_BITS, LinearScheme, Plan

_BISECTIONS = 60


def with_bits(scheme: LinearScheme, bits: int) -> LinearScheme:
    return LinearScheme(scheme.method, bits, scheme.group_size)


def lowest_bits(scheme: LinearScheme | None) -> LinearScheme | None:
    return None if scheme is None else with_bits(scheme, min(METHOD_BITS[scheme.method]))


def choices(scheme: LinearScheme) -> list[LinearScheme | None]:
    """What a layer may become: its method at each of its bits, and full precision."""
    return [*(with_bits(scheme, bits) for bits in METHOD_BITS[scheme.method]), None]


def cost_of(choice: LinearScheme | None, measured: LinearScheme, cost: float) -> float:
    """In nats a token, from the cost of the scheme that was measured."""
    if choice is None:
        return 0.0
    return cost * ((2**measured.bits - 1) / (2**choice.bits - 1)) ** 2


def choose_bits(plan: Plan, costs: Mapping[str, float], config: ModelConfig, budget: float) -> Plan:
    """The plan of least memory whose costs add up to at most ``budget`` nats a token.

    plan: the schemes that ``costs`` were measured with. Lagrangian relaxation: with a price on a bit each layer chooses
    for itself, and the highest price that keeps within the budget is found by bisection.
    """
    modules = [module for module in model_modules(config) if module.name != HEAD and plan[module.name] is not None]
    low, high = math.log(1e-30), math.log(1e3)
    best = _at_price(plan, costs, modules, math.exp(low))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        chosen = _at_price(plan, costs, modules, math.exp(middle))
        if _total(chosen, plan, costs, modules) <= budget:
            best, low = chosen, middle
        else:
            high = middle
    return best


def _at_price(plan: Plan, costs: Mapping[str, float], modules: list[Module], price: float) -> Plan:
    """price: nats for a bit in each of a model's weights."""
    total = sum(module.num_inputs * module.num_outputs for module in modules)
    chosen = dict(plan)
    for module in modules:
        measured = plan[module.name]
        assert measured is not None
        share = module.num_inputs * module.num_outputs / total
        chosen[module.name] = _cheapest(measured, costs[module.name], price * share)
    return chosen


def _cheapest(measured: LinearScheme, cost: float, price: float) -> LinearScheme | None:
    """price: nats for a bit in each of the layer's weights."""

    def paid(choice: LinearScheme | None) -> float:
        bits = FULL_BITS if choice is None else choice.bits_per_weight
        return cost_of(choice, measured, cost) + price * bits

    return min(choices(measured), key=paid)


def _total(chosen: Plan, plan: Plan, costs: Mapping[str, float], modules: list[Module]) -> float:
    total = 0.0
    for module in modules:
        measured = plan[module.name]
        assert measured is not None
        total += cost_of(chosen[module.name], measured, costs[module.name])
    return total
