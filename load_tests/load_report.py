"""The report of a finished load run: prints its numbers, writes summary.json, draws the pictures, and judges.

    python load_tests/load_report.py FOLDER

FOLDER is what run_load.py left, here or on a machine without matplotlib. Ends with code 1 when the run did not pass.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path

from load_plan import PLAN, Plan
from load_summary import Summary, summarize
from verdict import shortfalls

SUMMARY = "summary.json"
PICTURES = ("latency.png", "tokens.png", "kv.png")


def report(folder: Path) -> tuple[Summary, list[str]]:
    """Everything that can be made of the folder's files; the numbers, and what did not pass."""
    summary = summarize(folder)
    problems = shortfalls(Plan.read(folder / PLAN).profile, summary)
    (folder / SUMMARY).write_text(json.dumps({**asdict(summary), "problems": problems}, indent=1) + "\n")
    print(table(summary))
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no matplotlib here: draw the pictures elsewhere with load_tests/load_report.py {folder}")
    else:
        from load_pictures import draw

        draw(folder, summary)
    for text, count in summary.errors.items():
        print(f"  {count} times {text}")
    for problem in problems:
        print(f"profile {summary.profile}: {problem}", file=sys.stderr)
    print(f"report: {folder}; {'did NOT pass' if problems else 'passed'}", flush=True)
    return summary, problems


def table(summary: Summary) -> str:
    """A line for each kind of user and event, and the run's totals."""
    lines = [f"{'user':<12} {'event, ms':<20} {'count':>7} {'p50':>9} {'p95':>9} {'p99':>9} {'longest':>9}"]
    for kind, events in sorted(summary.spreads.items()):
        for event, spread in events.items():
            values = (spread.p50, spread.p95, spread.p99, spread.longest)
            lines.append(f"{kind:<12} {event:<20} {spread.count:>7}" + "".join(f" {value:>9.1f}" for value in values))
    requests, failures = sum(summary.requests.values()), sum(summary.failures.values())
    cores = ", ".join(f"{kind} {value:.2f}" for kind, value in summary.cores.items())
    return "\n".join([
        *lines,
        f"{requests} requests, {failures} failed, in {summary.seconds:.0f} s with all users",
        f"{summary.output_tokens} output tokens at the clients, {summary.engine_output_tokens} from the engine",
        f"{summary.output_tok_s:.1f} output tokens/s at the clients, {summary.engine_output_tok_s:.1f} from the engine",
        f"KV pool at most {summary.kv_peak_share:.1%} used, {summary.preemptions} preemptions, "
        f"{summary.prefix_hit_share:.1%} of prompt tokens cached; at most {summary.running_peak} running and "
        f"{summary.waiting_peak} waiting; still held at the end: {summary.held or 'nothing'}",
        f"cores: {cores}",
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the files of one run")
    folder = parser.parse_args().folder
    try:
        _, problems = report(folder)
    except (OSError, ValueError, KeyError, IndexError) as error:
        print(f"load_report: {folder} is not the folder of a finished run: {error!r}", file=sys.stderr)
        return 2
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
