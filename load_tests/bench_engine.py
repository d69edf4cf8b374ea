"""Speed of the engine in this process: the standard workloads, results to load_tests/results/engine.jsonl.

    python load_tests/bench_engine.py --model load_tests/models/mistral-7b --name mistral-7b --set load_format=dummy
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

from results_file import RESULTS, ResultsFile
from workloads import WORKLOADS, Bench

from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True, help="the model's name in the results")
    parser.add_argument("--variant", default="bf16")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any engine setting")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "engine.jsonl")
    args = parser.parse_args()
    settings = {"prefix_caching": "false", **dict(item.split("=", 1) for item in args.set)}
    began = time.perf_counter()
    core = EngineCore(EngineConfig.from_parameters({"model": args.model, **settings}), progress=print)
    start_seconds = time.perf_counter() - began
    # As the engine's process does: a collection that walks all modules' objects takes as long as several steps.
    gc.collect()
    gc.freeze()
    results = ResultsFile(
        path=args.out, benchmark="bench_engine", model=args.name, variant=args.variant, settings=settings
    )
    results.record("start", "s", [start_seconds])
    bench = Bench(core)
    for name in args.workloads.split(","):
        metric, measure = WORKLOADS[name]
        measure(bench)
        preempted = core.stats()["preemptions_total"]
        results.record(name, metric, [measure(bench) for _ in range(args.runs)])
        preemptions = core.stats()["preemptions_total"] - preempted
        if preemptions:
            results.record(name, "preemptions", [preemptions / args.runs])


if __name__ == "__main__":
    main()
