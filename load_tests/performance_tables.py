"""Writes the tables of docs/performance.md from load_tests/results: the latest line of each measurement.

    python load_tests/performance_tables.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
_MARKED = re.compile(r"(<!-- table: (\w+)(?: on ([^>]*))? -->\n).*?(<!-- end -->)", re.DOTALL)
"""Benchmark, and optionally a part of the device's name."""


_QUALITY_COLUMNS = {
    "average bits": ("both", "average_bits"),
    "weights, MiB": ("both", "weights_mib"),
    "perplexity": ("both", "perplexity"),
    "loss, %": ("both", "loss_percent"),
    "prose, %": ("prose", "loss_percent"),
    "code, %": ("code", "loss_percent"),
    "KL, mnat": ("both", "kl_millinats"),
    "same top, %": ("both", "same_top_percent"),
}
"""Workload and metric of each column."""


def latest(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each measurement, in the order in which they first came."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in lines:
        key = tuple(str(line[name]) for name in ("benchmark", "device", "model", "variant", "workload", "metric"))
        found[key] = line
    return list(found.values())


def table(benchmark: str, lines: Iterable[dict[str, Any]]) -> str:
    """Markdown for one benchmark: a row a workload, a column a variant; all runs stand in the results file."""
    chosen = latest(line for line in lines if line.get("benchmark") == benchmark)
    parts = []
    for device, model in dict.fromkeys((line["device"], line["model"]) for line in chosen):
        rows = [line for line in chosen if (line["device"], line["model"]) == (device, model)]
        variants = list(dict.fromkeys(line["variant"] for line in rows))
        newest = max(rows, key=lambda line: line["date"])
        parts.append(f"{model} on {device}; {_origin(newest)}:\n")
        parts.append("| workload | unit | " + " | ".join(variants) + " |\n|---|---|" + "---|" * len(variants))
        for workload, metric in dict.fromkeys((line["workload"], line["metric"]) for line in rows):
            same = [line for line in rows if (line["workload"], line["metric"]) == (workload, metric)]
            values = {line["variant"]: line["value"] for line in same}
            cells = " | ".join(_number(values.get(variant)) for variant in variants)
            parts.append(f"| {workload} | {metric} | {cells} |")
        parts.append("")
    return "\n".join(parts)


def kernel_table(lines: Iterable[dict[str, Any]]) -> str:
    """Markdown for bench_kernels: a row a kernel and shape, with the share of what plain kernels reach."""
    found: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for line in lines:
        if line.get("benchmark") == "bench_kernels":
            found.setdefault((line["device"], line["kernel"], line["shape"]), {})[line["metric"]] = line
    parts = []
    for device in dict.fromkeys(key[0] for key in found):
        rows = {key[1:]: metrics for key, metrics in found.items() if key[0] == device}
        newest = max((line for metrics in rows.values() for line in metrics.values()), key=lambda line: line["date"])
        ceilings = newest["ceilings"]
        parts.append(
            f"{device}; {_origin(newest)}. Reading reaches {ceilings['read_gb_s']:,.0f} GB/s, a bf16 product of size "
            f"8,192 {ceilings['bf16_tflop_s']:,.0f} TFLOP/s:\n"
        )
        parts.append("| kernel | shape | us | GB/s | of reading | TFLOP/s | of the product |\n" + "|---" * 7 + "|")
        for (kernel, shape), metrics in rows.items():
            if shape == "ceiling":
                continue
            cells = [_number(metrics["us"]["value"])]
            for metric, ceiling in (("gb_s", "read_gb_s"), ("tflop_s", "bf16_tflop_s")):
                value = metrics[metric]["value"] if metric in metrics else None
                share = "" if value is None else f"{100 * value / ceilings[ceiling]:.0f}%"
                cells += [_number(value), share]
            parts.append(f"| {kernel} | {shape} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def quality_table(lines: Iterable[dict[str, Any]]) -> str:
    """Markdown for bench_quality: a row a variant, memory first, then what it costs; losses of each text too."""
    chosen = latest(line for line in lines if line.get("benchmark") == "bench_quality")
    parts = []
    for device, model in dict.fromkeys((line["device"], line["model"]) for line in chosen):
        rows = [line for line in chosen if (line["device"], line["model"]) == (device, model)]
        values = {(line["variant"], line["workload"], line["metric"]): line["value"] for line in rows}
        newest = max(rows, key=lambda line: line["date"])
        tokens = newest["settings"]["tokens"]
        part = "all of both texts" if tokens == "all" else f"about {tokens:,} tokens of each text"
        parts.append(f"{model} on {device}, {part}; {_origin(newest)}:\n")
        parts.append(f"| variant | {' | '.join(_QUALITY_COLUMNS)} |\n|{'---|' * (len(_QUALITY_COLUMNS) + 1)}")
        for variant in dict.fromkeys(line["variant"] for line in rows):
            cells = [_number(values.get((variant, *source))) for source in _QUALITY_COLUMNS.values()]
            parts.append(f"| {variant} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def render(document: str, lines: list[dict[str, Any]]) -> str:
    """``document`` with every marked table made anew."""

    def made(match: re.Match[str]) -> str:
        chosen = [line for line in lines if (match[3] or "") in line["device"]]
        special = _SPECIAL_TABLES.get(match[2])
        text = table(match[2], chosen) if special is None else special(chosen)
        return f"{match[1]}{text}{match[4]}"

    return _MARKED.sub(made, document)


def read_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def _origin(line: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
    return f"{line['date'][:10]}, commit {line['commit']}, {versions}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


_SPECIAL_TABLES = {"bench_kernels": kernel_table, "bench_quality": quality_table}


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text(), read_results()))
