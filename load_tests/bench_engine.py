"""Speed of the engine in this process: the standard workloads, results to load_tests/results/engine.jsonl.

    python load_tests/bench_engine.py --model load_tests/models/mistral-7b --name mistral-7b --set load_format=dummy
"""

from __future__ import annotations

import gc
import time

from engine_arguments import engine_parser, engine_settings
from results_file import ResultsFile
from workloads import WORKLOADS, Bench

from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore


def main() -> None:
    parser = engine_parser(__doc__, "engine.jsonl")
    parser.add_argument("--variant", default="bf16")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    settings = {"prefix_caching": "false", **engine_settings(args)}
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
