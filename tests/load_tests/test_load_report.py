"""The report of a load run, from files whose numbers are known; how users' records travel."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from load_plan import PLAN, Plan
from load_records import MOMENTS, RUN, SERVER, Recorder, RecordFiles, RequestRecord, read_requests, read_tokens
from load_server import STATS
from load_summary import summarize
from profiles import FIRST_TOKEN, REFUSAL, Limit, Profile, Span

ROOT = Path(__file__).parents[2]
PROFILE = Profile(
    users={"stream": 2, "wrong_input": 1},
    spawn_rate=1,
    run_time=10,
    prompt_tokens=Span(low=1, high=2),
    max_tokens=Span(low=1, high=2),
    limits=(Limit("stream", FIRST_TOKEN, 0.99, 500),),
)
RECORDS = (
    RequestRecord(kind="stream", ended=1003.5, time_to_first_token=100.0, request=900.0, output_tokens=30),
    RequestRecord(kind="stream", ended=1005.5, time_to_first_token=300.0, request=1100.0, output_tokens=50),
    RequestRecord(kind="wrong_input", ended=1006.0, refusal=4.0),
)
FAILED = RequestRecord(kind="stream", ended=1006.0, request=9999.0, error="EngineFailed: it, \"broke\"\nbadly")


def write_run(folder: Path, *records: RequestRecord, held: dict[str, int] | None = None) -> Path:
    """All users ran from 1000.5 to 1009.2. 20 tokens came before that, 10 a second in it, 5 after."""
    folder.mkdir(exist_ok=True)
    recorder = Recorder()
    for record in records:
        recorder.add(record)
    for second in range(1001, 1009):
        recorder.add_tokens(second + 0.25, 4)
        recorder.add_tokens(second + 0.75, 6)
    recorder.add_tokens(1000.1, 20)
    with RecordFiles(folder) as files:
        files.write(json.loads(json.dumps(recorder.drain())))
        recorder.add_tokens(1009.5, 5)
        files.write(json.loads(json.dumps(recorder.drain())))
    with (folder / SERVER).open("w", newline="") as file:
        rows = csv.DictWriter(file, ("time", *STATS))
        rows.writeheader()
        for second in range(999, 1012):
            values = dict.fromkeys(STATS, 0) | {
                "kv_blocks_total": 100, "kv_blocks_used": 40 if second == 1005 else 10, "running_requests": 2,
                "output_tokens_total": 12 * second, "prefix_cache_query_tokens_total": 8 * second,
                "prefix_cache_hit_tokens_total": 2 * second, "preemptions_total": max(second - 1009, 0),
            }  # fmt: skip
            rows.writerow({"time": second} | (values if second != 1007 else {}))
    moments = {"all_started": 1000.5, "ended": 1009.2}
    (folder / MOMENTS).write_text(json.dumps(moments))
    run = {"profile": "test", "model": "m", "device": "d", "users": dict(PROFILE.users), "held": held or {}}
    (folder / RUN).write_text(json.dumps({**run, "cores": {"clients": 0.5}, **moments}))
    plan = Plan(
        profile=PROFILE, seed=1, grpc="a:1", http="a:2", alphabet="ab", num_added=1, has_chat_template=False,
        adapters=["x"], has_mix=False,
    )  # fmt: skip
    plan.write(folder / PLAN)
    assert Plan.read(folder / PLAN) == plan
    return folder


def test_records_come_back_from_their_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path, *RECORDS, FAILED)
    assert read_requests(folder) == [*RECORDS, FAILED]
    assert read_tokens(folder) == {1000: 20, **dict.fromkeys(range(1001, 1009), 10), 1009: 5}


def test_numbers_are_those_of_the_time_in_which_all_users_ran(tmp_path: Path) -> None:
    summary = summarize(write_run(tmp_path, *RECORDS, FAILED, held={"running_requests": 1}))
    assert (summary.output_tok_s, summary.output_tokens) == (10.0, 105)
    assert summary.engine_output_tokens == 12 * (1011 - 999)
    assert summary.engine_output_tok_s == pytest.approx(12.0)
    assert summary.seconds == pytest.approx(8.7)
    assert summary.requests == {"stream": 3, "wrong_input": 1}
    assert summary.failures == {"stream": 1}
    assert summary.errors == {f"stream: {FAILED.error}": 1}
    first_token = summary.spreads["stream"][FIRST_TOKEN]
    assert (first_token.count, first_token.p50, first_token.p99) == (2, 100.0, 300.0)
    assert summary.spreads["stream"]["request"].longest == 1100.0
    assert summary.spreads["wrong_input"][REFUSAL].count == 1
    assert (summary.kv_peak_share, summary.running_peak, summary.preemptions) == (0.4, 2, 2)
    assert summary.prefix_hit_share == pytest.approx(0.25)
    assert (summary.held, summary.engine_restarts) == ({"running_requests": 1}, 0)


def make_report(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "load_tests/load_report.py"), str(folder)]
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "HOME": str(folder.parent)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_report_of_a_good_run_has_pictures(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", *RECORDS)
    finished = make_report(folder)
    assert finished.returncode == 0, finished.stderr
    assert "3 requests, 0 failed" in finished.stdout
    assert "105 output tokens at the clients, 144 from the engine" in finished.stdout
    assert "10.0 output tokens/s at the clients, 12.0 from the engine" in finished.stdout
    for name in ("latency.png", "tokens.png", "kv.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG"), name
    written = json.loads((folder / "summary.json").read_text())
    assert written["problems"] == [] and written["spreads"]["stream"][FIRST_TOKEN]["p99"] == 300.0


def test_the_report_of_a_bad_run_says_why(tmp_path: Path) -> None:
    finished = make_report(write_run(tmp_path / "run", *RECORDS, FAILED))
    assert finished.returncode == 1
    assert "profile test: 1 of 4 requests failed" in finished.stderr
    assert "EngineFailed: it" in finished.stdout


def test_another_folder_is_refused(tmp_path: Path) -> None:
    finished = make_report(tmp_path)
    assert finished.returncode == 2
    assert "is not the folder of a finished run" in finished.stderr and "Traceback" not in finished.stderr
