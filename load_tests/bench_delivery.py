"""Delivery-only execute (the engine in a process of its own) against an engine step inside execute, with a real
Triton server and no model: a step is some milliseconds of computing, and gives every live stream one token.

``python -m load_tests.bench_delivery --step-ms 10 --streams 1 16 64`` appends to load_tests/results/delivery.jsonl. The
variants alternate, so that a noisy machine disturbs all of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from load_tests.results_file import ResultsFile
from tests.fakes.byte_tokenizer import write_byte_tokenizer
from tests.live.live_server import LiveServer, fake_repository, serve
from tests.live.requests import Answer, GrpcStream

HERE = Path(__file__).parent
RESULTS = HERE / "results/delivery.jsonl"
LATE_REQUEST = "late"


@dataclass(frozen=True)
class Case:
    """One run. Times in milliseconds; the late request arrives while all others run."""

    tokens_per_second: float
    first_token_ms: float
    """Median over the streams."""
    late_first_token_ms: float
    load_average: float
    """Of the last minute, when the run began: more than the cores means that others disturbed it."""


def run_case(server: LiveServer, model: str, num_streams: int, num_tokens: int) -> Case:
    """All streams at once on one gRPC connection, and one more when they have run for half a second."""
    options: dict[str, object] = {"max_tokens": num_tokens}
    if model != "step_inside":
        options |= {"stream": True, "return_num_output_tokens": True}
    load_average = round(os.getloadavg()[0], 1)
    submitted: dict[str, float] = {}
    first: dict[str, float] = {}
    with GrpcStream(server, model, batched=model != "llm_vllm") as stream:
        names = [str(index) for index in range(num_streams)]
        began = time.monotonic()
        for name in names:
            submitted[name] = time.monotonic()
            stream.submit("hello", request_id=name, **options)
        finished = tokens = 0
        last = began
        while finished < num_streams + 1:
            if LATE_REQUEST not in submitted and time.monotonic() - began > 0.5:
                submitted[LATE_REQUEST] = time.monotonic()
                stream.submit("hello", request_id=LATE_REQUEST, **{**options, "max_tokens": 1})
            answer = stream.next()
            now = time.monotonic()
            first.setdefault(answer.request_id, now)
            finished += answer.is_final
            if answer.request_id != LATE_REQUEST:
                tokens, last = tokens + _num_tokens(answer), now
    waits = [1000 * (first[name] - submitted[name]) for name in names]
    return Case(
        tokens_per_second=tokens / (last - began),
        first_token_ms=statistics.median(waits),
        late_first_token_ms=1000 * (first[LATE_REQUEST] - submitted[LATE_REQUEST]),
        load_average=load_average,
    )


@contextmanager
def bench_server(step_ms: float, doors: int) -> Iterator[LiveServer]:
    """Both ways in one server; what is not measured is idle."""
    os.environ["TRIDENT_BENCH_STEP_SECONDS"] = str(step_ms / 1000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repository = fake_repository(folder, f"--busy --step-time {step_ms / 1000}")
        shutil.copytree(HERE / "repositories/step_inside", repository / "step_inside")
        tokenizer = write_byte_tokenizer(folder / "model")
        settings = ["--set", "max_num_seqs=256", "--set", "max_queue_size=0", "--doors", str(doors)]
        with serve("--model-repository", str(repository), "--model", str(tokenizer), *settings) as server:
            yield server


def _num_tokens(answer: Answer) -> int:
    return answer.outputs.get("num_output_tokens", [1])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--doors", type=int, default=2, help="instances of llm")
    parser.add_argument("--models", nargs="+", default=["step_inside", "llm", "llm_vllm"])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    keys = [(num_streams, model) for num_streams in arguments.streams for model in arguments.models]
    cases: dict[tuple[int, str], list[Case]] = {key: [] for key in keys}
    with bench_server(arguments.step_ms, arguments.doors) as server:
        for _ in range(arguments.runs):
            for num_streams, model in keys:
                cases[num_streams, model].append(run_case(server, model, num_streams, arguments.tokens))
    settings = {"step_ms": arguments.step_ms, "doors": arguments.doors, "new_tokens": arguments.tokens}
    for (num_streams, model), runs in cases.items():
        results = ResultsFile(
            path=RESULTS,
            benchmark="bench_delivery",
            model=f"a step of {arguments.step_ms:g} ms",
            variant=model,
            settings={**settings, "load_average": max(case.load_average for case in runs)},
        )
        workload = f"streams_{num_streams}"
        results.record(workload, "output_tok_s", [case.tokens_per_second for case in runs])
        results.record(workload, "first_token_ms", [case.first_token_ms for case in runs])
        results.record(workload, "late_first_token_ms", [case.late_first_token_ms for case in runs])


if __name__ == "__main__":
    main()
