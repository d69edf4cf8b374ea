"""Draws docs/quality_bits.png and docs/quality_groups.png from load_tests/results/quality.jsonl.

    python load_tests/quality_curves.py [--model smollm2-135m]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from quality_results import read_measured
from quality_variants import BITS, GROUP_SIZES, GROUPED
from quality_verdict import AVERAGE_BITS, LOSS, Measured
from results_file import RESULTS

DOCS = Path(__file__).parents[1] / "docs"
_LOSS_TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)
_COLORS = {"rtn": "tab:blue", "awq": "tab:orange", "gptq": "tab:green", "smoothquant": "tab:red"}


def draw_bits(measured: Measured, path: Path) -> None:
    """Loss over average bits: a curve a method, a star where ``isq_max_loss`` chose."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for method in GROUPED:
        points = [measured[f"{method}-{bits}"] for bits in BITS if f"{method}-{bits}" in measured]
        axes.plot(*_coordinates(points), "o-", color=_COLORS[method], label=method)
        _star(axes, measured, f"{method}-loss", _COLORS[method])
    if "smoothquant" in measured:
        axes.plot(*_coordinates([measured["smoothquant"]]), "s", color=_COLORS["smoothquant"], label="smoothquant")
    axes.set_xlabel("average bits of a weight, scales and zero points included")
    _finish(axes, figure, path, "4, 5, 6 and 8 bits; stars: bits chosen for isq_max_loss=0.05")


def draw_groups(measured: Measured, path: Path) -> None:
    """Loss at 4 bits over group size."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for method in GROUPED:
        sizes = [size for size in GROUP_SIZES if f"{method}-4-{size}" in measured]
        losses = [measured[f"{method}-4-{size}"][LOSS] for size in sizes]
        axes.plot([GROUP_SIZES.index(size) for size in sizes], losses, "o-", color=_COLORS[method], label=method)
    shown = [size for size in GROUP_SIZES if any(f"{method}-4-{size}" in measured for method in GROUPED)]
    axes.set_xticks([GROUP_SIZES.index(size) for size in shown], shown)
    axes.set_xlabel("weights that share a scale")
    _finish(axes, figure, path, "4 bits")


def _coordinates(points: list[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    return [point[AVERAGE_BITS] for point in points], [point[LOSS] for point in points]


def _star(axes: Any, measured: Measured, name: str, color: str) -> None:
    if name in measured:
        axes.plot(*_coordinates([measured[name]]), "*", color=color, markersize=14, markeredgecolor="black")


def _finish(axes: Any, figure: Any, path: Path, title: str) -> None:
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks(_LOSS_TICKS, map(str, _LOSS_TICKS))
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set_ylabel("perplexity loss, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the model's name in the results")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.jsonl")
    args = parser.parse_args()
    measured = read_measured(args.results, args.model)
    draw_bits(measured, DOCS / "quality_bits.png")
    draw_groups(measured, DOCS / "quality_groups.png")


if __name__ == "__main__":
    main()
