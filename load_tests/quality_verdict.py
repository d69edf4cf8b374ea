"""What the quality of quantized models must be, and whether measured numbers are so. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LOSS = "loss_percent"
AVERAGE_BITS = "average_bits"
LEAST_RTN_LOSS = 2.0
"""A smaller loss at 4 bits says that the weights lay on such a grid before: nothing can be concluded."""
_OF_RTN = {"awq": 0.75, "gptq": 0.65}
"""Most of RTN's loss at 4 bits in groups of the same size."""
_MOST_LOSS = {"rtn-8": 0.5, "smoothquant": 2.0}
_MOST_CHOSEN_LOSS = 5.0
_MOST_CHOSEN_BITS = 6.2

Measured = Mapping[str, Mapping[str, float]]
"""Metrics by variant."""


@dataclass(frozen=True)
class Verdict:
    """One requirement held against what was measured."""

    text: str
    passed: bool

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.text}"


def is_valid(measured: Measured) -> bool:
    """Whether 4 bits cost this model anything, as far as that was measured."""
    return "rtn-4" not in measured or measured["rtn-4"][LOSS] >= LEAST_RTN_LOSS


def verdicts(measured: Measured) -> list[Verdict]:
    """Of all requirements whose variants were measured."""
    found = []
    for method, most in _OF_RTN.items():
        for name, metrics in measured.items():
            other = name.replace(method, "rtn", 1)
            if not name.startswith(f"{method}-4") or other not in measured:
                continue
            share = metrics[LOSS] / measured[other][LOSS]
            found.append(Verdict(f"{name}: {share:.2f} of the loss of {other}; at most {most}", share <= most))
    for name, most in _MOST_LOSS.items():
        if name in measured:
            loss = measured[name][LOSS]
            found.append(Verdict(f"{name}: loses {loss:.2f}%; less than {most}%", loss < most))
    for name, metrics in measured.items():
        if name.endswith("-loss"):
            loss, bits = metrics[LOSS], metrics[AVERAGE_BITS]
            found.append(
                Verdict(
                    f"{name}: loses {loss:.2f}% at {bits:.2f} average bits; at most {_MOST_CHOSEN_LOSS}% at "
                    f"{_MOST_CHOSEN_BITS}",
                    loss <= _MOST_CHOSEN_LOSS and bits <= _MOST_CHOSEN_BITS,
                )
            )
    return found
