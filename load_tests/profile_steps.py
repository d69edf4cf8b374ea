"""What the GPU does during decode steps: time by kernel, and how long it waits between two steps.

    python load_tests/profile_steps.py --model load_tests/models/mistral-7b --name mistral-7b --set load_format=dummy

Results go to load_tests/results/profile.jsonl, one line per workload. A step ends with the kernel that draws its
tokens; the gap is the time without any kernel or copy from there to the next step's first matrix product.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from engine_arguments import engine_parser, engine_settings
from results_file import ResultsFile
from workloads import Bench, Shape, mixed_shapes, submits_of

from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore

_DRAW = "_sample_tokens_kernel"
_SHOWN_SHARE = 0.01
"""Of a step: kernels that take less are not recorded."""


@dataclass(frozen=True)
class Activity:
    """A kernel or copy on the GPU; times in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class StepTimes:
    """Medians over the profiled steps, in microseconds."""

    step: float
    idle: float
    gap: float
    kernels: dict[str, float]
    """Time by kernel, the longest first."""


def record(work: Callable[[], object]) -> list[Activity]:
    """What the GPU does during ``work``, in order of the starts."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    events = profile.profiler.kineto_results.events()
    on_gpu = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
    found = [Activity(e.name(), e.start_ns() / 1e3, (e.start_ns() + e.duration_ns()) / 1e3) for e in on_gpu]
    return sorted(found, key=lambda activity: activity.start)


def step_times(activities: Sequence[Activity]) -> StepTimes:
    """Cut at the ends of the draws. Overlapping activities (dependent launches) count once."""
    ends = [index for index, activity in enumerate(activities) if _DRAW in activity.name]
    steps, idles, gaps = [], [], []
    by_kernel: dict[str, list[float]] = collections.defaultdict(list)
    for first, last in itertools.pairwise(ends[2:-1]):
        reached, idle, gap, in_gap = activities[first].end, 0.0, 0.0, True
        busy: collections.Counter[str] = collections.Counter()
        for activity in activities[first + 1 : last + 1]:
            waited = max(activity.start - reached, 0.0)
            idle += waited
            gap += waited if in_gap else 0.0
            in_gap = in_gap and not _is_product(activity.name)
            busy[_short(activity.name)] += max(activity.end - max(activity.start, reached), 0.0)
            reached = max(reached, activity.end)
        steps.append(reached - activities[first].end)
        idles.append(idle)
        gaps.append(gap)
        for name, time in busy.items():
            by_kernel[name].append(time)
    medians = {name: statistics.median(times) for name, times in by_kernel.items()}
    longest = dict(sorted(medians.items(), key=lambda item: -item[1]))
    return StepTimes(statistics.median(steps), statistics.median(idles), statistics.median(gaps), longest)


def _is_product(name: str) -> bool:
    return any(word in name for word in ("matrix_vector", "matmul", "gemm", "nvjet", "cutlass"))


def _short(name: str) -> str:
    return name.split("(")[0].split("<")[0].removeprefix("void ")[:60]


def report(results: ResultsFile, workload: str, times: StepTimes) -> None:
    for name in ("step", "idle", "gap"):
        results.record(workload, f"{name}_us", [getattr(times, name)])
    results.record(workload, "gap_percent", [100 * times.gap / times.step])
    for name, time in times.kernels.items():
        if time >= _SHOWN_SHARE * times.step:
            results.record(workload, f"us in {name}", [time])


def main() -> None:
    parser = engine_parser(__doc__, "profile.jsonl")
    parser.add_argument("--variant", default="bf16")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 64, 256])
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 2048], help="lengths of prompts to profile")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    settings: dict[str, Any] = {"prefix_caching": "false", **engine_settings(args)}
    core = EngineCore(EngineConfig.from_parameters({"model": args.model, **settings}), progress=print)
    gc.collect()
    gc.freeze()
    profile_workloads(core, args, settings)


def profile_workloads(core: EngineCore, args: argparse.Namespace, settings: dict[str, Any]) -> None:
    results = ResultsFile(
        path=args.out, benchmark="profile_steps", model=args.name, variant=args.variant, settings=settings
    )
    bench = Bench(core)
    for tokens in args.prompts:
        bench.run([Shape(tokens, 1)])
        shapes = [Shape(tokens, 1)]
        report(results, f"prompt_{tokens}", step_times(record(lambda s=shapes: [bench.run(s) for _ in range(9)])))
    for count in args.streams:
        # The middle of the standard workload: 128 tokens of prompt, 128 of 256 new ones.
        bench.run([Shape(128, 8)] * count)
        submits = submits_of(bench.prompts([Shape(256, 0)] * count), [args.steps + 100] * count)
        for submit in submits:
            core.add(submit)
        begun: set[str] = set()
        while len(begun) < count:
            begun.update(delta.request_id for delta in core.step())
        for _ in range(10):
            core.step()
        report(results, f"streams_{count}", step_times(record(lambda: [core.step() for _ in range(args.steps)])))
        for submit in submits:
            core.abort(submit.request_id)
        while core.has_work():
            core.step()
    profile_mixed(core, bench, args.steps, results)


def profile_mixed(core: EngineCore, bench: Bench, num_steps: int, results: ResultsFile) -> None:
    """Steps from the middle of the mixed workload, where prompts arrive as fast as answers end."""
    shapes = mixed_shapes(500)
    submits = submits_of(bench.prompts(shapes), [shape.new_tokens for shape in shapes])
    for submit in submits:
        core.add(submit)
    for _ in range(100):
        core.step()
    times = step_times(record(lambda: [core.step() for _ in range(num_steps)]))
    # Steps of different sizes run different kernels: their medians would not add up.
    report(results, "mixed", dataclasses.replace(times, kernels={}))
    for submit in submits:
        core.abort(submit.request_id)
    while core.has_work():
        core.step()


if __name__ == "__main__":
    main()
