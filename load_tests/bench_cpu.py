"""The engine on a CPU beside transformers.generate in bf16, in one process; results to load_tests/results/cpu.jsonl.

    python load_tests/bench_cpu.py [--variants bf16,rtn-8,rtn-4]

Engine and transformers alternate, so that a noisy machine disturbs both; ratios are medians of each pair of runs. One
stream and 16 streams: prompt of 61 tokens, 128 new tokens, output tokens/s with the prompt's time included.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from results_file import RESULTS, ResultsFile
from transformers import AutoModelForCausalLM
from workloads import Bench, random_prompt

from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore
from trident_llm.launch.default_model import default_model

PROMPT_TOKENS, NEW_TOKENS, LONG_PROMPT = 61, 128, 500
VARIANTS = {
    "bf16": {},
    "rtn-8": {"isq_method": "rtn", "isq_bits": "8"},
    "rtn-8-channel": {"isq_method": "rtn", "isq_bits": "8", "isq_group_size": "channel"},
    "rtn-4": {"isq_method": "rtn", "isq_bits": "4"},
    "smoothquant": {"isq_method": "smoothquant"},
    "fp8": {"isq_method": "fp8"},
}
"""Settings beside those of all. Speed depends on the format of the weights, not on the method that found them."""


@dataclass(frozen=True)
class Pair:
    """One measurement made both ways; ``ratio`` says how much better the engine's value is."""

    name: str
    metric: str
    engine: Callable[[], float]
    transformers: Callable[[], float]
    ratio: Callable[[float, float], float]


class Transformers:
    """``generate`` with greedy search on a static batch, never ending early."""

    def __init__(self, gguf: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        self.model.generation_config.eos_token_id = None
        self._rng = random.Random(1)

    def seconds(self, batch: int, prompt_tokens: int, new_tokens: int) -> float:
        vocab_size = self.model.config.vocab_size
        prompts = torch.tensor([random_prompt(self._rng, prompt_tokens, vocab_size) for _ in range(batch)])
        begin = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=False
            )
        seconds = time.perf_counter() - begin
        assert output.shape[1] == prompt_tokens + new_tokens
        return seconds

    def rate(self, batch: int) -> float:
        return batch * NEW_TOKENS / self.seconds(batch, PROMPT_TOKENS, NEW_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="a GGUF file; default: the bundled SmolLM2-135M")
    parser.add_argument("--variants", default="bf16", help=f"comma-separated, of {', '.join(VARIANTS)} (%(default)s)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.jsonl")
    args = parser.parse_args()
    unknown = set(args.variants.split(",")) - set(VARIANTS)
    if unknown:
        parser.error(f"--variants: {', '.join(sorted(unknown))} not among {', '.join(VARIANTS)}")
    gguf = args.model or Path(default_model())
    other = Transformers(gguf)
    for variant in args.variants.split(","):
        compare(variant, gguf, other, args.runs, args.out)


def compare(variant: str, gguf: Path, other: Transformers, runs: int, out: Path) -> None:
    """Measure one variant of the engine and transformers in turn, and record both."""
    common = {"dtype": "bf16", "device": "cpu", "prefix_caching": "false", "max_model_len": "1024"}
    settings = {**common, **VARIANTS[variant]}
    bench = Bench(EngineCore(EngineConfig.from_parameters({"model": str(gguf), **settings}), progress=print))
    ratio = "ratio" if variant == "bf16" else f"{variant}-ratio"
    names = {"engine": variant, "transformers": "transformers", "ratio": ratio}
    files = {
        key: ResultsFile(path=out, benchmark="bench_cpu", model="smollm2-135m", variant=name, settings=settings)
        for key, name in names.items()
    }
    pairs = [
        Pair(
            "one_stream", "output_tok_s", lambda: bench.streams(1, PROMPT_TOKENS, NEW_TOKENS),
            lambda: other.rate(1), lambda ours, theirs: ours / theirs,
        ),
        Pair(
            "streams_16", "output_tok_s", lambda: bench.streams(16, PROMPT_TOKENS, NEW_TOKENS),
            lambda: other.rate(16), lambda ours, theirs: ours / theirs,
        ),
        Pair(
            "first_token_500", "ms", lambda: bench.first_token_ms(LONG_PROMPT),
            lambda: other.seconds(1, LONG_PROMPT, 1) * 1e3, lambda ours, theirs: ours / theirs,
        ),
    ]  # fmt: skip
    measured: dict[str, list[tuple[float, float]]] = {pair.name: [] for pair in pairs}
    for run in range(runs + 1):
        for pair in pairs:
            values = pair.engine(), pair.transformers()
            if run:  # the first one warms up
                measured[pair.name].append(values)
    for pair in pairs:
        files["engine"].record(pair.name, pair.metric, [ours for ours, _ in measured[pair.name]])
        if variant == "bf16":
            files["transformers"].record(pair.name, pair.metric, [theirs for _, theirs in measured[pair.name]])
        files["ratio"].record(pair.name, "ratio", [pair.ratio(*values) for values in measured[pair.name]])
    gain = [many / one for (one, _), (many, _) in zip(measured["one_stream"], measured["streams_16"], strict=True)]
    files["engine"].record("streams_16_over_one", "ratio", gain)


if __name__ == "__main__":
    main()
