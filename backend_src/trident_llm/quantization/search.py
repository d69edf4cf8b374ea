"""The search behind ``isq_max_loss``: bits chosen from measured costs are tried, and the budget is corrected."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import BadRequest
from .scheme import Plan

_FIRST_SHARE = 0.85
"""Of the bound: costs of single layers say a little less than what they make together."""
_NEAR_ENOUGH = 0.8
"""A loss from this share of the bound to the bound ends the search."""
_MOST_TRIALS = 5
_LARGEST_STEP = 4.0


@dataclass(frozen=True)
class Trial:
    """A plan, and what the model quantized by it loses."""

    plan: Plan
    loss: float
    """Perplexity's relative increase on held-out text."""


def search_plan(max_loss: float, choose: Callable[[float], Plan], measure: Callable[[Plan], float]) -> Trial:
    """The best trial, which is also the last one made.

    choose: from a budget in nats a token to a plan. measure: quantizes by a plan; nats that a token of held-out text
    costs more than in full precision. Raises ``BadRequest`` when no trial stays within ``max_loss``.
    """
    bound = math.log1p(max_loss)
    budget = _FIRST_SHARE * bound
    best: tuple[Plan, float] | None = None
    least, last = math.inf, None
    for _ in range(_MOST_TRIALS):
        plan = choose(budget)
        if plan == last:
            break
        last, increase = plan, measure(plan)
        least = min(least, increase)
        if increase <= bound and (best is None or increase > best[1]):
            best = plan, increase
        if _NEAR_ENOUGH * bound <= increase <= bound:
            break
        # Aim between what is near enough and the bound; costs go about with the budget.
        wanted = bound * (1 + _NEAR_ENOUGH) / 2
        factor = wanted / increase if increase > 0 else _LARGEST_STEP
        budget *= min(max(factor, 1 / _LARGEST_STEP), _LARGEST_STEP)
    if best is None:
        raise BadRequest(
            f"isq_max_loss: {max_loss:g} is less than what any choice of bits that was tried loses; the least was "
            f"{math.expm1(least):.4f}"
        )
    if last != best[0]:
        return Trial(best[0], math.expm1(measure(best[0])))
    return Trial(best[0], math.expm1(best[1]))
