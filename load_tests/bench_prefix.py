"""What the prefix cache is worth, and what it costs; results to load_tests/results/prefix.jsonl.

    python load_tests/bench_prefix.py --model load_tests/models/mistral-7b --name mistral-7b --set load_format=dummy

One engine serves both ways, in turns, so that a noisy machine disturbs both; ratios are medians of paired runs.

prefix_2000, prefix_8000   time to the first token of a request with so many tokens that another has had before it, and
                           20 of its own, beside the time of that other one
prefix_streams_N           requests/s of N that arrive together with 2,000 tokens in common and 100 of their own, 64 new
                           tokens each, beside prefix_caching=false
prefix_no_hit_N            output tokens/s of N that arrive together and have nothing in common (128 tokens, 256 new),
                           beside prefix_caching=false
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from dataclasses import dataclass

from engine_arguments import engine_parser, engine_settings
from results_file import ResultsFile
from workloads import random_prompt, run

from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore


@dataclass(frozen=True)
class Pair:
    """One measurement without and with the cache's help."""

    without: float
    with_cache: float

    @property
    def ratio(self) -> float:
        return self.with_cache / self.without


@dataclass(frozen=True)
class Workload:
    name: str
    metric: str
    longest: int
    """Tokens of its longest sequence."""
    measure: Callable[[], Pair]


class PrefixBench:
    """Every run gets fresh random tokens: only what a workload itself repeats can be found in the cache."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._rng = random.Random(0)

    def workloads(self, streams: int) -> list[Workload]:
        return [
            Workload("prefix_2000", "first_token_ms", 2021, lambda: self.first_token(2000)),
            Workload("prefix_8000", "first_token_ms", 8021, lambda: self.first_token(8000)),
            Workload(f"prefix_streams_{streams}", "req_s", 2164, lambda: self.common_prefix(streams)),
            Workload(f"prefix_no_hit_{streams}", "output_tok_s", 384, lambda: self.no_hit(streams)),
        ]

    def first_token(self, num_common: int, num_own: int = 20) -> Pair:
        """Milliseconds; both requests run alone, the second one finds the common tokens in the cache."""
        common = self._tokens(num_common)
        first, second = (run(self.core, [common + self._tokens(num_own)], [1]).total * 1e3 for _ in range(2))
        return Pair(first, second)

    def common_prefix(self, streams: int, num_common: int = 2000, num_own: int = 100, num_new: int = 64) -> Pair:
        def requests_per_second(caching: bool) -> float:
            common = self._tokens(num_common)
            prompts = [common + self._tokens(num_own) for _ in range(streams)]
            return streams / self._run(caching, prompts, num_new)

        return Pair(requests_per_second(False), requests_per_second(True))

    def no_hit(self, streams: int, num_prompt: int = 128, num_new: int = 256) -> Pair:
        def tokens_per_second(caching: bool) -> float:
            prompts = [self._tokens(num_prompt) for _ in range(streams)]
            return streams * num_new / self._run(caching, prompts, num_new)

        return Pair(tokens_per_second(False), tokens_per_second(True))

    def _run(self, caching: bool, prompts: list[list[int]], num_new: int) -> float:
        """Seconds. Nothing runs before or after, so that the setting can change in between."""
        self.core.blocks.prefix_caching = caching
        seconds = run(self.core, prompts, [num_new] * len(prompts)).total
        self.core.blocks.prefix_caching = True
        return seconds

    def _tokens(self, count: int) -> list[int]:
        return random_prompt(self._rng, count, self.core.model.config.vocab_size)


def main() -> None:
    parser = engine_parser(__doc__, "prefix.jsonl")
    parser.add_argument("--streams", type=int, default=64, help="requests that arrive together")
    parser.add_argument("--workloads", help="default: all that the model's context has room for")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    settings = engine_settings(args)
    config = EngineConfig.from_parameters({"model": args.model, **settings, "prefix_caching": "true"})
    core = EngineCore(config, progress=print)
    workloads = PrefixBench(core).workloads(args.streams)
    fitting = [workload for workload in workloads if workload.longest <= core.model.max_model_len]
    chosen = args.workloads.split(",") if args.workloads else [workload.name for workload in fitting]
    if unknown := set(chosen) - {workload.name for workload in fitting}:
        parser.error(f"--workloads: {', '.join(sorted(unknown))}; allowed: {', '.join(w.name for w in fitting)}")
    gc.collect()
    gc.freeze()
    files = {
        variant: ResultsFile(
            path=args.out, benchmark="bench_prefix", model=args.name, variant=variant, settings=settings
        )
        for variant in ("without", "with", "ratio")
    }
    for workload in fitting:
        if workload.name in chosen:
            workload.measure()
            pairs = [workload.measure() for _ in range(args.runs)]
            files["without"].record(workload.name, workload.metric, [pair.without for pair in pairs])
            files["with"].record(workload.name, workload.metric, [pair.with_cache for pair in pairs])
            files["ratio"].record(workload.name, "ratio", [pair.ratio for pair in pairs])


if __name__ == "__main__":
    main()
