"""Draws docs/xlora_quality.png from load_tests/results/xlora_quality.jsonl: losses by task, and the mix's scalings.

    python load_tests/xlora_picture.py [--model smollm2-135m]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from performance_tables import latest
from results_file import RESULTS

PICTURE = Path(__file__).parents[1] / "docs" / "xlora_quality.png"
_SCALING = "scaling_of_"


def read_measured(path: Path, model: str) -> dict[tuple[str, str, str], float]:
    """The latest values by variant, task and metric."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = latest(line for line in lines if line["model"] == model)
    return {(line["variant"], line["workload"], line["metric"]): line["value"] for line in chosen}


def draw(measured: dict[tuple[str, str, str], float], path: Path) -> None:
    """Bars of the losses of each variant on each task, and of each member's mean scaling on each task."""
    variants = list(dict.fromkeys(variant for variant, _, _ in measured))
    tasks = list(dict.fromkeys(task for _, task, _ in measured))
    members = list(dict.fromkeys(metric for _, _, metric in measured if metric.startswith(_SCALING)))
    figure, (losses, scalings) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    _bars(losses, tasks, {variant: [measured[variant, task, "loss"] for task in tasks] for variant in variants})
    losses.set_yscale("log")
    losses.set_ylabel("held-out loss, nats a token")
    shares = {name.removeprefix(_SCALING): [measured["mix", task, name] for task in tasks] for name in members}
    _bars(scalings, tasks, shares)
    scalings.set_ylabel("mean scaling in the mix")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axes: Any, tasks: list[str], heights: dict[str, list[float]]) -> None:
    width = 0.8 / len(heights)
    for index, (name, values) in enumerate(heights.items()):
        axes.bar([place + index * width for place in range(len(tasks))], values, width, label=name)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(tasks))], tasks)
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    draw(read_measured(RESULTS / "xlora_quality.jsonl", args.model), PICTURE)


if __name__ == "__main__":
    main()
