"""Device memory of a paged KV cache beside a static one, for 32 chat-like requests at once; results to
load_tests/results/kv_memory.jsonl.

    python load_tests/bench_kv_memory.py --model load_tests/models/mistral-7b --name mistral-7b --set load_format=dummy

The paged pool is the smallest that preempts nobody (load_tests/capacity.py finds it in steps); an engine with it then
serves requests of those lengths, 32 at a time, and must not preempt. The static cache has 4,096 tokens for each of the
32. Both are allocated, and what torch has allocated meanwhile is recorded.
"""

from __future__ import annotations

import gc

import torch
from capacity import BLOCK_SIZE, MAX_MODEL_LEN, read_lengths, smallest_pool
from engine_arguments import engine_parser, engine_settings
from results_file import ResultsFile
from workloads import Bench, Shape, submits_of

from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore
from trident_llm.engine.kv_cache import KVCache

_NUM_REQUESTS = 128


def allocated_gib(core: EngineCore, num_blocks: int) -> float:
    """GiB of device memory that a KV cache of the engine's model takes with so many blocks."""
    model = core.model
    before = torch.cuda.memory_allocated(model.device)
    cache = KVCache(
        model.config, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=model.dtype, device=model.device
    )
    taken = torch.cuda.memory_allocated(model.device) - before
    del cache
    return taken / 2**30


def serve(core: EngineCore, places: int) -> int:
    """Run requests of chat-like lengths, ``places`` at a time; returns the preemptions."""
    bench = Bench(core)
    shapes = [Shape(length.prompt, length.output) for length in read_lengths()[:_NUM_REQUESTS]]
    waiting = submits_of(bench.prompts(shapes), [shape.new_tokens for shape in shapes])
    live: set[str] = set()
    while waiting or live:
        while waiting and len(live) < places:
            submit = waiting.pop()
            core.add(submit)
            live.add(submit.request_id)
        live -= {delta.request_id for delta in core.step() if delta.finish_reason}
    return int(core.stats()["preemptions_total"])


def main() -> None:
    parser = engine_parser(__doc__, "kv_memory.jsonl")
    parser.add_argument("--places", type=int, default=32, help="requests at once")
    args = parser.parse_args()
    num_blocks = {
        "paged": smallest_pool(read_lengths(), args.places),
        "static": args.places * MAX_MODEL_LEN // BLOCK_SIZE,
    }
    own = {"max_num_blocks": str(num_blocks["paged"]), "max_num_seqs": str(args.places), "prefix_caching": "false"}
    settings = {**own, "max_model_len": str(MAX_MODEL_LEN), **engine_settings(args)}
    core = EngineCore(EngineConfig.from_parameters({"model": args.model, **settings}), progress=print)
    preemptions = serve(core, args.places)
    gc.collect()
    taken = {variant: allocated_gib(core, blocks) for variant, blocks in num_blocks.items()}
    for variant, gib in taken.items():
        results = ResultsFile(
            path=args.out, benchmark="bench_kv_memory", model=args.name, variant=variant, settings=settings
        )
        results.record(f"chats_{args.places}", "device_gib", [gib])
        if variant == "paged":
            results.record(f"chats_{args.places}", "preemptions", [preemptions])
            results.record(f"chats_{args.places}", "saved_percent", [100 * (1 - gib / taken["static"])])


if __name__ == "__main__":
    main()
