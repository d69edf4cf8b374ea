"""Speed with adapters beside that without, in this process; results to load_tests/results/adapters.jsonl.

    python load_tests/bench_adapters.py --model load_tests/models/mistral-7b --name mistral-7b --set load_format=dummy

One engine with ``--adapters`` random adapters of rank 16 on all linear layers: one stream and 64, without adapters,
with one, with 8 and with all of them by turns, and how much longer than usual a step takes while another is loaded.
Then engines with an X-LoRA mix of 4 members, top-2: without the mix, with it, and with scalings that freeze. The latter
are counted twice: from the first token on, and (``_after_freeze``) once every stream has frozen its scalings.
"""

from __future__ import annotations

import functools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from engine_arguments import engine_parser, engine_settings
from random_adapters import write_random_adapters, write_random_mix
from results_file import ResultsFile
from workloads import Bench, Shape, submits_of

from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore

RANK, MEMBERS, TOP_K, FREEZE_AFTER = 16, 4, 2, 16


def main() -> None:
    parser = engine_parser(__doc__, "adapters.jsonl")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--parts", nargs="*", choices=_PARTS, default=list(_PARTS))
    args = parser.parse_args()
    settings = {"prefix_caching": "false", "max_lora_rank": str(RANK), **engine_settings(args)}
    # A process for each engine: an earlier one's graphs and pool would take the memory of the next.
    spawn = multiprocessing.get_context("spawn")
    for part in args.parts:
        process = spawn.Process(target=_run_part, args=(part, args, settings))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


def _run_part(part: str, args, settings: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _PARTS[part](args, settings, Path(folder))


def _bench_lora(args, settings: dict[str, str], folder: Path) -> None:
    paths = write_random_adapters(_made(folder / "lora"), args.model, count=args.adapters + 1, rank=RANK)
    names = [path.name for path in paths[:-1]]
    own = {
        "adapters": ",".join(f"{path.name}={path}" for path in paths[:-1]), "adapter_root": str(folder / "lora"),
        "max_loras": str(args.adapters), "max_cpu_loras": str(args.adapters + 1),
    }  # fmt: skip
    core = _make_core(args.model, {**settings, **own})
    bench = Bench(core)
    shown = {**settings, "max_loras": str(args.adapters)}
    for count in dict.fromkeys((0, 1, min(8, args.adapters), args.adapters)):
        results = _results(args, f"lora-{count}" if count else "base", shown)
        adapters = names[:count] or [""]
        for streams in (1, args.streams):
            _speed(bench, streams, adapters, args.new_tokens)
            runs = [_speed(bench, streams, adapters, args.new_tokens)[0] for _ in range(args.runs)]
            results.record(f"streams_{streams}", "output_tok_s", runs)
    results = _results(args, "load", shown)
    results.record(f"streams_{args.streams}", "longer_step_ms", [
        _disturbance(bench, args.streams, names[:8], 4 * args.new_tokens, paths[-1].name) for _ in range(args.runs)
    ])  # fmt: skip
    core.close()


def _bench_mix(args, settings: dict[str, str], folder: Path, variant: str, freeze_after: int) -> None:
    mix = write_random_mix(folder / "mix", args.model, members=MEMBERS, rank=RANK, top_k=TOP_K)
    shown = {**settings, "max_loras": str(MEMBERS), "freeze_after": str(freeze_after)}
    core = _make_core(args.model, {**shown, "xlora": str(mix)})
    counted_from = {"": 1, "_after_freeze": freeze_after + 1} if freeze_after else {"": 1}
    bench = Bench(core)
    for name, xlora in ((f"{variant}-off", False), (variant, True)):
        results = _results(args, name, shown)
        for streams in (1, args.streams):
            speeds = [
                _speed(bench, streams, [""], args.new_tokens, xlora=xlora, counted_from=tuple(counted_from.values()))
                for _ in range(1 + args.runs)
            ]
            for suffix, runs in zip(counted_from, zip(*speeds[1:], strict=True), strict=True):
                results.record(f"streams_{streams}{suffix}", "output_tok_s", list(runs))
    core.close()


def _make_core(model: str, settings: dict[str, str]) -> EngineCore:
    return EngineCore(EngineConfig.from_parameters({"model": model, **settings}), progress=print)


def _results(args, variant: str, settings: dict[str, str]) -> ResultsFile:
    return ResultsFile(
        path=args.out, benchmark="bench_adapters", model=args.name, variant=variant, settings=settings
    )


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _speed(
    bench: Bench, streams: int, adapters: Sequence[str], new_tokens: int, *, xlora: bool | None = None,
    counted_from: tuple[int, ...] = (1,),
) -> tuple[float, ...]:  # fmt: skip
    """Output tokens/s once every stream has its ``counted_from``th token, each of them; adapters by turns."""
    have = dict.fromkeys(_add(bench, streams, adapters, new_tokens, xlora), 0)
    reached: list[tuple[float, int]] = []
    while bench.core.has_work():
        for delta in bench.core.step():
            have[delta.request_id] += 1
        if len(reached) < len(counted_from) and min(have.values()) >= counted_from[len(reached)]:
            reached.append((time.perf_counter(), sum(have.values())))
    ended, total = time.perf_counter(), sum(have.values())
    return tuple((total - count) / (ended - began) for began, count in reached)


def _disturbance(bench: Bench, streams: int, adapters: Sequence[str], new_tokens: int, loaded: str) -> float:
    """Milliseconds by which the longest step while an adapter is loaded, and first used, exceeds the median of all."""
    waiting = _add(bench, streams, adapters, new_tokens, None)
    core, steps, during = bench.core, [], 0.0
    reply, used = None, False
    while core.has_work():
        began = time.perf_counter()
        waiting -= {delta.request_id for delta in core.step()}
        seconds = time.perf_counter() - began
        if waiting:
            continue
        steps.append(seconds)
        if reply is None and len(steps) > new_tokens // 4:
            reply = core.run_command("load_adapter", {"name": "late", "path": loaded})
        elif reply is not None and len(steps) < new_tokens * 3 // 4:
            during = max(during, seconds)
            if reply.done() and not used:
                reply.result()
                _add(bench, 1, ["late"], 1, None)
                used = True
    assert used, "the load took longer than the streams"
    core.run_command("unload_adapter", {"name": "late"}).result()
    return (during - statistics.median(steps)) * 1e3


def _add(bench: Bench, streams: int, adapters: Sequence[str], new_tokens: int, xlora: bool | None) -> set[str]:
    prompts = bench.prompts([Shape(128, new_tokens)] * streams)
    submits = submits_of(prompts, [new_tokens] * streams)
    for index, submit in enumerate(submits):
        changed = msgspec.structs.replace(submit, adapter=adapters[index % len(adapters)], xlora=xlora)
        bench.core.add(changed)
    return {submit.request_id for submit in submits}


_PARTS: dict[str, Callable[..., None]] = {
    "lora": _bench_lora,
    "xlora": functools.partial(_bench_mix, variant="xlora", freeze_after=0),
    "xlora-frozen": functools.partial(_bench_mix, variant="xlora-frozen", freeze_after=FREEZE_AFTER),
}


if __name__ == "__main__":
    main()
