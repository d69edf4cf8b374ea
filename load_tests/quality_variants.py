"""What bench_quality compares: engine settings by a short name, METHOD-BITS with what differs from the defaults."""

from __future__ import annotations

from collections.abc import Mapping

GROUPED = ("rtn", "awq", "gptq")
BITS = (4, 5, 6, 8)
GROUP_SIZES = ("32", "64", "128", "channel")
MAX_LOSS = 0.05


def _variants() -> dict[str, Mapping[str, str]]:
    found: dict[str, Mapping[str, str]] = {}
    for method in GROUPED:
        for bits in BITS:
            found[f"{method}-{bits}"] = {"isq_method": method, "isq_bits": str(bits)}
        for size in GROUP_SIZES:
            found[f"{method}-4-{size}"] = {"isq_method": method, "isq_bits": "4", "isq_group_size": size}
        found[f"{method}-loss"] = {"isq_method": method, "isq_max_loss": str(MAX_LOSS)}
    found["smoothquant"] = {"isq_method": "smoothquant"}
    return found


VARIANTS: Mapping[str, Mapping[str, str]] = _variants()
ESSENTIAL = ("rtn-4", "rtn-8", "awq-4", "gptq-4", "smoothquant", "rtn-loss", "awq-loss", "gptq-loss")


def chosen_variants(text: str) -> list[str]:
    """For ``essential``, ``all`` or names with commas between. Raises ValueError naming what is unknown."""
    if text in ("essential", "all"):
        return list(ESSENTIAL if text == "essential" else VARIANTS)
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not among essential, all, {', '.join(VARIANTS)}")
    return names
