"""What 8 bits of K and V cost in quality: perplexity of a fixed text; results to load_tests/results/kv_quality.jsonl.

    python load_tests/bench_kv_quality.py [--set dtype=fp32] [--dtypes auto,int8,fp8]

The text is Python's language reference as Python carries it (``pydoc_data.topics``, in alphabetical order), cut into
sequences. Each is computed in chunks, so that all but the first read the keys before them from the cache alone.

perplexity         of every token but a sequence's first
loss_percent       how much larger the perplexity is than with kv_cache_dtype=auto
same_top_percent   positions whose most likely token is that of kv_cache_dtype=auto
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import torch
from engine_arguments import add_settings, engine_settings
from results_file import RESULTS, ResultsFile
from teacher_forced import TeacherForced
from torch import Tensor

from trident_llm import EngineConfig
from trident_llm.engine.loading import load_model
from trident_llm.launch.default_model import default_model
from trident_llm.text import Tokenizer

_CHUNK = 128


@dataclass(frozen=True)
class Quality:
    """Over all positions that have a next token."""

    logprobs: Tensor
    """[N] float32 of the tokens that really follow."""
    top_ids: Tensor
    """[N] int64: the most likely tokens."""

    @property
    def perplexity(self) -> float:
        return math.exp(-self.logprobs.double().mean().item())


def measure(forced: TeacherForced, sequences: list[list[int]]) -> Quality:
    parts = [
        (chunk.logprobs.cpu(), chunk.logits.argmax(-1).cpu()) for tokens in sequences for chunk in forced.chunks(tokens)
    ]
    return Quality(torch.cat([logprobs for logprobs, _ in parts]), torch.cat([top_ids for _, top_ids in parts]))


def text_sequences(tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """``count`` sequences of ``length`` tokens. Raises ValueError when the text is shorter."""
    topics = pydoc_data.topics.topics
    tokens = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)))
    if len(tokens) < count * length:
        raise ValueError(f"the text has {len(tokens)} tokens; {count} sequences of {length} are asked for")
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the bundled SmolLM2-135M")
    parser.add_argument("--name", default="smollm2-135m", help="the model's name in the results")
    add_settings(parser)
    parser.add_argument("--dtypes", default="auto,int8", help="values of kv_cache_dtype, auto first")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--out", type=Path, default=RESULTS / "kv_quality.jsonl")
    args = parser.parse_args()
    names = args.dtypes.split(",")
    if names[0] != "auto":
        parser.error(f"--dtypes: {args.dtypes}; auto must come first: the others are held against it")
    settings = engine_settings(args)
    fixed = {"model": args.model or str(default_model()), "max_model_len": str(args.length), "max_num_seqs": "1"}
    model = load_model(EngineConfig.from_parameters({**settings, **fixed}), print)
    sequences = text_sequences(Tokenizer(model.tokenizer_folder), args.sequences, args.length)
    workload = f"{str(model.dtype).removeprefix('torch.')}_{args.sequences}x{args.length}"
    baseline: Quality | None = None
    for name in names:
        file = ResultsFile(
            path=args.out, benchmark="bench_kv_quality", model=args.name, variant=name, settings=settings
        )
        quality = measure(TeacherForced(model, name, args.length, _CHUNK), sequences)
        baseline = baseline or quality
        file.record(workload, "perplexity", [quality.perplexity])
        if name != "auto":
            file.record(workload, "loss_percent", [100 * (quality.perplexity / baseline.perplexity - 1)])
            same = (quality.top_ids == baseline.top_ids).float().mean().item()
            file.record(workload, "same_top_percent", [100 * same])


if __name__ == "__main__":
    with torch.inference_mode():
        main()
