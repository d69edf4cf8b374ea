"""Users of many kinds at a real Triton server: one command that runs them, reports, and judges.

    python load_tests/run_load.py --profile smoke

Starts a server (or takes the one that --host names), lets locust's users loose on it as profiles.py says, and leaves a
folder with locust's HTML and CSV, the raw measurements, a summary in JSON and pictures. Ends with code 1 when a limit
of a profile was missed. Runs on a server of its own add lines to load_tests/results/load.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from bench_server import default_clients
from client_pool import BenchFailed
from engine_arguments import add_settings, engine_settings, names_of, positive
from load_plan import PLAN, PLAN_VARIABLE
from load_records import MOMENTS, RUN
from load_report import report
from load_server import Server, StatsWatch, load_server, make_plan
from load_summary import Summary
from profiles import BETWEEN_TOKENS, FIRST_TOKEN, PROFILES, REFUSAL, Profile
from results_file import RESULTS, ResultsFile, device_name
from served_model import ROOT, CpuSeconds, end_through_contexts, environment_of_checkout

from trident_client import TridentError

LOCUSTFILE = ROOT / "load_tests/locustfile.py"
MARGIN_SECONDS = 120.0
"""How much longer than its profile says a run may take, from the start of its processes to their end."""
RECORDED = (FIRST_TOKEN, BETWEEN_TOKENS, REFUSAL)
"""Events of each kind of user in the results; summary.json has all."""


def main() -> int:
    args = parse_arguments()
    end_through_contexts()
    profiles = {name: PROFILES[name] for name in args.profile}
    passed = True
    try:
        with load_server(args, profiles) as server:
            for name, profile in profiles.items():
                if args.run_time is not None:
                    profile = replace(profile, run_time=args.run_time)
                summary, problems = run_profile(args, server, name, profile)
                passed = passed and not problems
                if server.served is not None:
                    record(args, profile, summary)
    except BenchFailed as error:
        print(f"run_load: {error}", file=sys.stderr)
        return 1
    return 0 if passed else 1


def run_profile(args: argparse.Namespace, server: Server, name: str, profile: Profile) -> tuple[Summary, list[str]]:
    """One run, from the plan to the report. Raises ``BenchFailed`` when it cannot be brought to its end."""
    folder = args.report / name
    folder.mkdir(parents=True, exist_ok=True)
    print(f"\n{name}: {profile.num_users} users for {profile.run_time} s in {args.processes} processes", flush=True)
    make_plan(server, profile).write(folder / PLAN)
    began, cpu_began = time.monotonic(), _cpu_seconds(server)
    try:
        with StatsWatch(server, folder) as watch:
            run_locust(args.processes, profile, folder)
            cores = _cores(cpu_began, _cpu_seconds(server), time.monotonic() - began)
            held = watch.wait_until_whole()
    except TridentError as error:
        raise BenchFailed(f"{error}{server.served.tail() if server.served else ''}") from None
    run = {
        "profile": name,
        "model": args.name,
        "device": device_name() if server.served else f"the server at {server.grpc}",
        "users": dict(profile.users),
        "held": held,
        "cores": cores,
        **json.loads((folder / MOMENTS).read_text()),
    }
    (folder / RUN).write_text(json.dumps(run, indent=1) + "\n")
    return report(folder)


def run_locust(processes: int, profile: Profile, folder: Path) -> None:
    """All users, spread over ``processes``. Raises ``BenchFailed`` when locust does not end well and in time."""
    command = [
        sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary",
        f"--processes={processes}", "--expect-workers-max-wait=60", "--master-bind-host=127.0.0.1",
        *(f"--master{bind}-port={port}" for port in [_free_port()] for bind in ("", "-bind")),
        f"--users={profile.num_users}", f"--spawn-rate={profile.spawn_rate}", f"--stop-timeout={profile.stop_timeout}",
        f"--csv={folder / 'locust'}", "--csv-full-history", f"--html={folder / 'locust.html'}",
    ]  # fmt: skip
    environment = {
        **environment_of_checkout(),
        PLAN_VARIABLE: str(folder / PLAN),
        # A worker that has stopped would otherwise wait for the stop timeout once more before it heeds its master.
        "LOCUST_WORKER_ADDITIONAL_WAIT_BEFORE_READY_AFTER_STOP": str(-profile.stop_timeout),
    }
    log = folder / "locust.log"
    seconds = profile.num_users / profile.spawn_rate + profile.run_time + profile.stop_timeout + MARGIN_SECONDS
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise BenchFailed(f"locust was not ready after {seconds:.0f} s{_tail(log)}") from None
        finally:
            _end_group(process)
    if code or not (folder / MOMENTS).exists():
        raise BenchFailed(f"locust ended with exit code {code}{_tail(log)}")


def record(args: argparse.Namespace, profile: Profile, summary: Summary) -> None:
    """Lines of load_tests/results/load.jsonl: those of the whole run, and those of each kind of user."""
    results = ResultsFile(
        path=args.out,
        benchmark="run_load",
        model=args.name,
        variant=args.variant,
        settings={
            **engine_settings(args), **({"doors": args.doors} if args.doors else {}), "processes": args.processes,
            "users": dict(profile.users), "run_time": profile.run_time,
        },
    )  # fmt: skip
    for metric, value in _totals(summary).items():
        results.record(summary.profile, metric, [value])
    for kind, events in summary.spreads.items():
        for event in RECORDED:
            if spread := events.get(event):
                for metric, value in (("p50_ms", spread.p50), ("p99_ms", spread.p99)):
                    results.record(f"{summary.profile}/{kind}", f"{event}_{metric}", [value])


def _totals(summary: Summary) -> dict[str, float]:
    return {
        "output_tok_s": summary.output_tok_s,
        "output_tokens": summary.output_tokens,
        "engine_output_tokens": summary.engine_output_tokens,
        "requests": sum(summary.requests.values()),
        "failures": sum(summary.failures.values()),
        "kv_peak_percent": 100 * summary.kv_peak_share,
        "running_peak": summary.running_peak,
        "preemptions": summary.preemptions,
        "held_at_end": sum(summary.held.values()),
        **{f"{kind}_cores": value for kind, value in summary.cores.items()},
    }


def _cpu_seconds(server: Server) -> tuple[float, CpuSeconds | None]:
    """Of the client processes that have ended, and of the server's where it is the run's own."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime, server.served.cpu_seconds() if server.served else None


def _cores(
    before: tuple[float, CpuSeconds | None], after: tuple[float, CpuSeconds | None], seconds: float
) -> dict[str, float]:
    cores = {"clients": (after[0] - before[0]) / seconds}
    if before[1] is not None and after[1] is not None:
        used = after[1] - before[1]
        cores |= {kind: getattr(used, kind) / seconds for kind in ("server", "doors", "engine")}
    return cores


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of locust's processes, which are a group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _tail(log: Path) -> str:
    return "\n".join(["", *log.read_text(errors="replace").splitlines()[-30:]])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--profile", type=names_of(PROFILES), default=["smoke"], metavar="NAME,...",
        help=f"run one after another: {', '.join(PROFILES)} (default: smoke)")  # fmt: skip
    add("--run-time", type=positive, metavar="SECONDS", help="of each profile with all users (default: as it says)")
    add("--processes", type=positive, default=default_clients(), metavar="N",
        help="client processes (default: half the cores, at most 8)")  # fmt: skip
    add("--report", type=Path, metavar="FOLDER", help="for a folder of each profile (default: one in build/load)")
    add("--host", metavar="HOST:PORT", help="gRPC endpoint of a running server; otherwise one is started")
    add("--http", metavar="HOST:PORT", help="its HTTP endpoint (default: port 8000 of the same host)")
    add("--admin-token", default=os.environ.get("TRIDENT_ADMIN_TOKEN", ""), help="default: $TRIDENT_ADMIN_TOKEN")
    add("--model", help="for a server of its own (default: that of scripts/serve)")
    add("--name", help="the model's name in results and pictures (default: the model's)")
    add("--variant", default="bf16", help="in the results (default: bf16)")
    add_settings(parser)
    add("--doors", type=positive, metavar="N", help="instances of the model llm (default: as its config.pbtxt says)")
    add("--out", type=Path, default=RESULTS / "load.jsonl")
    add("--start-timeout", type=float, default=300.0, metavar="SECONDS")
    args = parser.parse_args()
    if args.host is not None:
        args.http = args.http or f"{args.host.rpartition(':')[0]}:8000"
    args.name = args.name or (Path(args.model).name if args.model else "default model")
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    args.report = (args.report or ROOT / "build/load" / now).resolve()
    return args


if __name__ == "__main__":
    sys.exit(main())
