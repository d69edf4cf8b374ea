"""The users of the load test against a server that does what a script says, and run_load.py with a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from bad_options import BAD_OPTIONS
from load_plan import PLAN, Plan
from load_records import MOMENTS, RequestRecord, read_requests, read_tokens
from profiles import KINDS, Profile, Span
from run_load import run_locust

from tests.fakes.fake_triton import Answer, Behaviour, Break, Fail, FakeTriton, Generation, Hang
from trident_llm.launch.run_folder import RUN_VARIABLE

ROOT = Path(__file__).parents[2]


def run_users(folder: Path, users: dict[str, int], *script: Behaviour) -> tuple[list[RequestRecord], list[Generation]]:
    """A second of ``users`` in one process; what they recorded, and what the server was asked."""
    profile = Profile(
        users=users,
        spawn_rate=10,
        run_time=1,
        prompt_tokens=Span(low=4, high=16),
        max_tokens=Span(low=8, high=32),
        pause=0.2,
        stop_timeout=1,
    )
    with FakeTriton(*script) as server:
        plan = Plan(
            profile=profile, seed=3, grpc=server.url, http="", alphabet="xyz", num_added=1, has_chat_template=True,
            adapters=["poet", "cook"], has_mix=True,
        )  # fmt: skip
        plan.write(folder / PLAN)
        run_locust(1, profile, folder)
        return read_requests(folder), server.generations


def test_good_and_bad_answers_are_told_apart(tmp_path: Path) -> None:
    answer = Answer(tuple("abcdefgh"), delay=0.005)
    bad = (Fail("[UNAVAILABLE] the queue is full"), Break(("a",)), Answer(("a",), finish_reason="error"), Hang(("a",)))
    # Two of each kind: the one that is left hanging does nothing more.
    users = {"stream": 2, "chat": 2, "long_prompt": 2, "burst": 2, "adapter_mix": 2}
    records, generations = run_users(tmp_path, users, answer, *bad, answer)
    errors = Counter(record.error.split(":")[0] for record in records if record.error)
    assert errors == {"Overloaded": 1, "EngineFailed": 1, "WrongAnswer": 1, "not finished when the run was over": 1}
    assert generations[4].cancelled.wait(5)
    good = [record for record in records if not record.error]
    assert {record.kind for record in good} == set(users)
    assert all(record.output_tokens == 8 and record.request and record.longest_gap for record in good)
    assert all(record.time_to_first_token <= record.request for record in good)
    # The three answers that broke off had come to one token each.
    assert sum(read_tokens(tmp_path).values()) == 8 * len(good) + 3
    assert len(generations) == len(records)
    moments = json.loads((tmp_path / MOMENTS).read_text())
    assert 0.9 < moments["ended"] - moments["all_started"] < 4
    assert (tmp_path / "locust.html").exists() and (tmp_path / "locust_stats_history.csv").exists()
    check_prompts(generations)


def check_prompts(generations: list[Generation]) -> None:
    plain = [asked for asked in generations if asked.text_input and len(asked.text_input) < 16]
    assert len({asked.text_input for asked in plain}) > 1
    assert any(511 <= len(asked.text_input) <= 1023 for asked in generations)
    conversations = [json.loads(str(asked.parameters["messages"])) for asked in generations if not asked.text_input]
    assert {len(messages) for messages in conversations} >= {2, 4}
    assert len({messages[0]["content"] for messages in conversations}) == 1
    (longer, *_) = [messages for messages in conversations if len(messages) == 4]
    assert longer[2] == {"role": "assistant", "content": "abcdefgh"}
    adapted = {str(asked.parameters["adapter"]) for asked in generations if "adapter" in asked.parameters}
    assert adapted <= {"poet", "cook", "poet:0.7,cook:0.3", "cook:0.7,poet:0.3"}
    assert all("xlora" not in asked.parameters for asked in generations if "adapter" in asked.parameters)
    assert all(8 <= int(asked.parameters["max_tokens"]) <= 32 for asked in generations)


def test_only_a_refusal_that_names_the_option_is_a_success(tmp_path: Path) -> None:
    named = Fail(f"[INVALID_ARG] {', '.join(name for name, _ in BAD_OPTIONS)} are not allowed")
    script = (named, Fail("[INVALID_ARG] no"), Answer(), Fail("[INTERNAL] max_tokens"), named)
    records, generations = run_users(tmp_path, {"wrong_input": 2}, *script)
    errors = sorted(record.error for record in records if record.error)
    assert [error.split(":")[0] for error in errors] == ["EngineFailed", "WrongAnswer", "WrongAnswer"]
    assert "does not name it" in " ".join(errors) and "was not refused" in " ".join(errors)
    refused = [record for record in records if not record.error]
    assert len(refused) == len(records) - 3 >= 3
    assert all(record.refusal > 0 and record.request is None and not record.output_tokens for record in refused)
    asked = [dict(generation.parameters) for generation in generations]
    assert any(set(parameters) & {"no_such_option", "top_p", "stop", "n"} for parameters in asked)


@pytest.mark.live
def test_smoke_passes_with_a_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("l")
    settings = {
        "load_format": "dummy", "dtype": "fp32", "device": "cpu", "num_threads": 1, "max_model_len": 2048,
        "max_num_seqs": 64, "max_queue_size": 256,
    }  # fmt: skip
    finished = subprocess.run(
        [
            sys.executable, "load_tests/run_load.py", "--profile=smoke", "--run-time=3", "--processes=2", "--doors=2",
            "--model=load_tests/models/tiny-llama", f"--report={folder / 'report'}", f"--out={folder / 'load.jsonl'}",
            *(f"--set={key}={value}" for key, value in settings.items()),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), RUN_VARIABLE: str(folder / "runs")},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " requests, 0 failed" in finished.stdout
    report = folder / "report" / "smoke"
    summary = json.loads((report / "summary.json").read_text())
    assert set(summary["requests"]) == set(KINDS)
    assert (summary["problems"], summary["held"], summary["failures"]) == ([], {}, {})
    assert set(summary["spreads"]["wrong_input"]) == {"refusal"}
    assert set(summary["spreads"]["canceller"]) == {"time_to_first_token", "cancelled"}
    plan = Plan.read(report / PLAN)
    assert plan.has_mix and len(plan.adapters) == 4 and plan.has_chat_template
    for name in ("locust.html", "locust_stats.csv", "server.csv", "latency.png", "tokens.png", "kv.png"):
        assert (report / name).stat().st_size > 0, name
    rows = {(row["workload"], row["metric"]): row for row in map(json.loads, (folder / "load.jsonl").open())}
    assert rows["smoke", "output_tok_s"]["value"] > 0 and rows["smoke", "held_at_end"]["value"] == 0
    assert rows["smoke/stream", "time_to_first_token_p99_ms"]["model"] == "tiny-llama"
    assert not list((folder / "runs").iterdir())


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    finished = subprocess.run(
        [sys.executable, str(ROOT / "load_tests/run_load.py"), "--profile", "smoke,nope"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 2
    assert "'nope' is not one of smoke" in finished.stderr and "Traceback" not in finished.stderr
