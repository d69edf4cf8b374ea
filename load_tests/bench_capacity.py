"""Paged KV cache beside a static one of the same memory, in steps: no GPU, no weights; results to
load_tests/results/capacity.jsonl, the picture to docs/capacity.png.

    python load_tests/bench_capacity.py
    python load_tests/bench_capacity.py --write-lengths     draws load_tests/chat_lengths.json anew
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from capacity import (
    BLOCK_SIZE,
    LENGTHS,
    MAX_MODEL_LEN,
    MAX_NUM_BATCHED_TOKENS,
    Simulation,
    Usage,
    paged,
    read_lengths,
    smallest_pool,
    static,
    write_lengths,
)
from results_file import RESULTS, ResultsFile

BYTES_PER_TOKEN = 2 * 32 * 8 * 128 * 2
"""K and V of Mistral-7B: layers, KV heads, head size, bytes of bf16."""
PICTURE = Path(__file__).parents[1] / "docs" / "capacity.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=32, help="sequences that the static cache has room for")
    parser.add_argument("--lengths", type=Path, default=LENGTHS, help="JSON file with prompt and output tokens")
    parser.add_argument("--write-lengths", action="store_true", help="draw the lengths anew, and do nothing else")
    parser.add_argument("--out", type=Path, default=RESULTS / "capacity.jsonl")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    if args.write_lengths:
        write_lengths(args.lengths)
        return
    lengths = read_lengths(args.lengths)
    settings = {
        "lengths": args.lengths.name, "max_model_len": MAX_MODEL_LEN, "block_size": BLOCK_SIZE, "places": args.places,
        "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
    }  # fmt: skip
    files = {
        variant: ResultsFile(
            path=args.out, benchmark="bench_capacity", model="Mistral-7B's KV cache", variant=variant, settings=settings
        )
        for variant in ("static", "paged", "ratio")
    }
    num_tokens = args.places * MAX_MODEL_LEN
    usages = {
        "static": Simulation(static(args.places), lengths).run(),
        "paged": Simulation(paged(num_tokens // BLOCK_SIZE), lengths).run(),
    }
    needed = sum(length.prompt + length.output - 1 for length in lengths)
    for variant, usage in usages.items():
        files[variant].record("same_memory", "kv_gib", [_gib(num_tokens)])
        files[variant].record("same_memory", "running_seqs", [usage.mean_running])
        files[variant].record("same_memory", "waste_percent", [100 * usage.waste])
        files[variant].record("same_memory", "steps", [len(usage.moments)])
        files[variant].record("same_memory", "preemptions", [usage.num_preemptions])
        recomputed = usage.num_computed_tokens / needed - 1
        files[variant].record("same_memory", "recomputed_percent", [100 * recomputed])
    more = usages["paged"].mean_running / usages["static"].mean_running
    files["ratio"].record("same_memory", "running_seqs", [more])
    pool = smallest_pool(lengths, args.places) * BLOCK_SIZE
    files["static"].record("nobody_preempted", "kv_gib", [_gib(num_tokens)])
    files["paged"].record("nobody_preempted", "kv_gib", [_gib(pool)])
    files["ratio"].record("nobody_preempted", "kv_gib", [pool / num_tokens])
    draw(usages, num_tokens, args.picture)


def draw(usages: dict[str, Usage], num_tokens: int, path: Path) -> None:
    """Memory allocated and holding tokens, and running sequences, over the steps that the paged cache takes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = len(usages["paged"].moments)
    figure, (memory, running) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    for (variant, usage), color in zip(usages.items(), ("tab:gray", "tab:blue"), strict=True):
        moments = usage.moments[:last]
        allocated, computed = ([_gib(getattr(m, kind)) for m in moments] for kind in ("allocated", "computed"))
        memory.plot(allocated, ":", color=color, linewidth=1.5, label=f"{variant}: allocated")
        memory.plot(computed, color=color, linewidth=1, label=f"{variant}: holds tokens")
        running.plot([moment.num_running for moment in moments], color=color, linewidth=1, label=variant)
    memory.set_title(f"{_gib(num_tokens):.0f} GiB of KV cache, {MAX_MODEL_LEN} tokens at most, more requests than fit")
    memory.set_ylabel("GiB")
    running.set(xlabel="step", ylabel="running sequences", xlim=(0, last))
    for axes in (memory, running):
        axes.legend(loc="center right")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _gib(num_tokens: int) -> float:
    return num_tokens * BYTES_PER_TOKEN / 2**30


if __name__ == "__main__":
    main()
