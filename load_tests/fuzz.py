"""Fuzzing guided by coverage of what strangers' bytes reach: requests, and the socket between doors and engine.

    pip install atheris
    python load_tests/fuzz.py requests --seconds 600
    python load_tests/fuzz.py socket --seconds 600

Inputs and what must hold are those of the property tests (tests/server/test_fuzz_requests.py and
tests/engine/test_fuzz_socket.py). Atheris chooses the bytes that hypothesis makes an input of, by what they reach in
trident_llm. A wrong result, an unexpected exception or an input that takes over 10 seconds ends the run with code 1;
the bytes then lie in the working directory. Results go to load_tests/results/fuzz.jsonl.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from results_file import RESULTS, ResultsFile

ROOT = Path(__file__).parents[1]
TARGETS = ("requests", "socket")
LONGEST_SECONDS = 10
"""For one input."""
MARGIN_SECONDS = 120
"""For the start, which instruments every function of the project."""
_CHILD = "--in-this-process"
_DONE = re.compile(r"Done (\d+) runs in (\d+) second")
_COVERED = re.compile(r"cov: (\d+)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz.jsonl")
    parser.add_argument(_CHILD, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_this_process:
        fuzz(args.target, args.seconds)
    command = [sys.executable, __file__, args.target, "--seconds", str(args.seconds), _CHILD]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=args.seconds + MARGIN_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"fuzz: {args.target}: no end after {args.seconds + MARGIN_SECONDS} s", file=sys.stderr)
        return 1
    ended, covered = _DONE.search(done.stderr), _COVERED.findall(done.stderr)
    if done.returncode or ended is None or not covered:
        print(done.stderr[-6000:], file=sys.stderr)
        return 1
    file = ResultsFile(
        path=args.out, benchmark="fuzz", model="-", variant=args.target, settings={"seconds": args.seconds}
    )
    file.record(args.target, "inputs", [int(ended[1])])
    file.record(args.target, "seconds", [int(ended[2])])
    file.record(args.target, "covered_edges", [int(covered[-1])])
    return 0


def fuzz(target: str, seconds: int) -> None:
    """Ends the process."""
    import atheris

    sys.path[:0] = [str(ROOT), str(ROOT / "backend_src"), str(ROOT / "client")]
    with atheris.instrument_imports(include=["trident_llm"]):
        from tests.engine import test_fuzz_socket as socket
        from tests.server import test_fuzz_requests as requests
    from hypothesis import given

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if target == "socket":
            door = stack.enter_context(socket.serving_door(folder))

            @socket.fuzz
            @given(socket.FRAMES)
            def frames(sent: list[bytes]) -> None:
                socket.send_and_ask(door, sent)

            run = frames.hypothesis.fuzz_one_input
        else:
            readers = requests.make_readers(folder)

            @requests.fuzz
            @given(requests.PARAMETERS, requests.PROMPTS, requests.TIMEOUTS, requests.INPUTS)
            def request(parameters, prompt, timeout, tensors) -> None:
                requests.read_parameters(readers, parameters, prompt, timeout)
                requests.read_tensors(readers, tensors)

            run = request.hypothesis.fuzz_one_input
        _explore(run, seconds)


def _explore(run: Callable[[bytes], bytes | None], seconds: int) -> None:
    import atheris

    limits = [f"-max_total_time={seconds}", f"-timeout={LONGEST_SECONDS}", "-rss_limit_mb=4096", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *limits], run)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
