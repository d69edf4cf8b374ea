"""bench_server as a command, with a real Triton server and a tiny model; its client process, with a scripted one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from load_tests.results_file import device_name
from tests.fakes.fake_triton import Answer, Behaviour, Break, Fail, FakeTriton, Refuse
from trident_llm.launch.run_folder import RUN_VARIABLE

ROOT = Path(__file__).parents[2]
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 1000,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SETTINGS = {
    "load_format": "dummy",
    "device": "cpu",
    "num_threads": 1,
    "max_num_blocks": 2048,
    "max_num_seqs": 64,
    "max_queue_size": 64,
}


class Bench:
    """The command on a tiny model, with a folder of its own for everything that it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out.jsonl"
        self.runs = folder / "runs"
        self.runs.mkdir()
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text(json.dumps(TINY_LLAMA))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "load_tests/bench_server.py"), "--name=tiny", "--variant=fp32"]
        command += [f"--model={self.folder / 'model'}", "--runs=1", "--doors=2", "--clients=2", f"--out={self.out}"]
        command += [f"--set={key}={value}" for key, value in SETTINGS.items()]
        paths = os.pathsep.join(path for path in sys.path if path)
        return subprocess.Popen(
            [*command, f"--engine-results={self.folder / 'engine.jsonl'}", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": paths, RUN_VARIABLE: str(self.runs)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """Its exit code and its output."""
        process = self.start(*arguments)
        output = process.communicate(timeout=100)[0]
        return process.returncode, output

    def lines(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What it recorded, by workload and metric."""
        rows = [json.loads(line) for line in self.out.read_text().splitlines()] if self.out.exists() else []
        return {(row["workload"], row["metric"]): row for row in rows}

    def leftovers(self) -> list[str]:
        """Processes and files of the server that outlived the command, and clients of it."""
        found = [str(path) for path in self.runs.iterdir()]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(RUN_VARIABLE, "").startswith(str(self.runs)):
                    found.append(str(process))
        return found


@pytest.fixture
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("b"))


@pytest.mark.live
def test_workloads_are_measured_and_compared(bench: Bench) -> None:
    own = {"benchmark": "bench_engine", "model": "tiny", "variant": "fp32", "device": device_name()}
    old, new = ({**own, "workload": "streams_64", "metric": "output_tok_s", "value": value} for value in (1.0, 1e9))
    (bench.folder / "engine.jsonl").write_text(f"{json.dumps(old)}\n{json.dumps(new)}\n")
    code, output = bench.run("--workloads=one_stream,first_token_128,streams_64")
    assert code == 0, output
    lines = bench.lines()
    streams = {"output_tok_s", "first_token_p50_ms", "first_token_p99_ms", "client_cpu_share"}
    lone = {("start", "s"), ("one_stream", "output_tok_s"), ("first_token_128", "ms")}
    assert set(lines) == lone | {("streams_64", metric) for metric in streams}
    for line in lines.values():
        assert (line["benchmark"], line["model"], line["variant"]) == ("bench_server", "tiny", "fp32")
        assert line["runs"] == [line["value"]] and line["value"] > 0
        assert line["settings"]["doors"] == line["settings"]["clients"] == 2
        assert line["settings"]["prefix_caching"] == "false"
    percentiles = [lines["streams_64", f"first_token_p{rank}_ms"]["value"] for rank in (50, 99)]
    assert percentiles == sorted(percentiles)
    rate = lines["streams_64", "output_tok_s"]["value"]
    assert output.splitlines()[-4].split() == ["streams_64", "output_tok_s", f"{rate:.2f}", "1000000000.00", "0.0%"]
    assert bench.leftovers() == []


@pytest.mark.live
def test_a_request_that_fails_fails_the_benchmark(bench: Bench) -> None:
    code, output = bench.run("--workloads=streams_64", "--set=max_num_seqs=8", "--set=max_queue_size=0")
    assert code == 1
    assert "of 64 requests failed:" in output and "times: [UNAVAILABLE] " in output
    assert set(bench.lines()) == {("start", "s")}
    assert bench.leftovers() == []


@pytest.mark.live
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--set=blok_size=16",), 1, "unknown setting 'blok_size'"),
        (("--start-timeout=0.5",), 1, "--start-timeout 0.5: the server was not ready by then"),
        (("--workloads=two_streams",), 2, "'two_streams' is not one of one_stream, "),
    ],
)
def test_what_cannot_start_ends_with_a_reason(bench: Bench, arguments: tuple[str, ...], code: int, words: str) -> None:
    ended, output = bench.run(*arguments)
    assert ended == code
    assert words in output and "Traceback" not in output
    assert bench.lines() == {} and bench.leftovers() == []


@pytest.mark.live
def test_told_to_end_it_ends_the_server(bench: Bench) -> None:
    process = bench.start()
    deadline = time.monotonic() + 60
    while not list(bench.runs.glob("*/models/llm_vllm/1")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert bench.leftovers() == [], output


class Client:
    """One client process."""

    def __init__(self, url: str) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "load_tests/stream_client.py"), url],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._hear() == {"connected": url}

    def run(self, prompts: list[str], new_tokens: list[int]) -> dict[str, Any]:
        self._say({"prompts": prompts, "new_tokens": new_tokens})
        assert self._hear() == {"prepared": len(prompts)}
        self._say(time.monotonic() + 0.1)
        return self._hear()

    def close(self) -> int:
        self.process.communicate(timeout=10)
        return self.process.returncode

    def _say(self, message: object) -> None:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def triton() -> Iterator[FakeTriton]:
    with FakeTriton() as server:
        yield server


@pytest.fixture(scope="module")
def client(triton: FakeTriton) -> Iterator[Client]:
    client = Client(triton.url)
    yield client
    assert client.close() == 0


def test_a_client_times_streams_and_counts_tokens(triton: FakeTriton, client: Client) -> None:
    triton.script = [Answer(tuple("abcd"), delay=0.1, first_delay=0.2, alive=True)]
    triton.generations.clear()
    began = time.monotonic()
    report = client.run(["one", "two", "three"], [4, 4, 4])
    assert 0 <= report["cpu_seconds"] < report["seconds"]
    for stream in report["streams"]:
        assert stream["error"] == ""
        assert stream["output_tokens"] == 4
        assert stream["submitted"] >= began + 0.1
        assert 0.2 <= stream["first_token"] - stream["submitted"] < 0.3 <= stream["ended"] - stream["first_token"]
    assert {generation.text_input for generation in triton.generations} == {"one", "two", "three"}
    wanted = {"temperature": 0, "ignore_eos": True, "max_tokens": 4, "stream": True, "return_num_output_tokens": True}
    for generation in triton.generations:
        assert {key: generation.parameters[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (Fail("[UNAVAILABLE] the queue is full", ("a",)), "[UNAVAILABLE] the queue is full"),
        (Refuse(details="going away"), "UNAVAILABLE: going away"),
        (Break(("a", "b")), "[INTERNAL] the stream ended before the answer did"),
        (Answer(("a",)), "1 output tokens instead of 2"),
    ],
)
def test_a_client_names_what_failed(triton: FakeTriton, client: Client, behaviour: Behaviour, error: str) -> None:
    triton.script = [Answer(("a", "b")), behaviour]
    streams = client.run(["x", "x"], [2, 2])["streams"]
    assert sorted(stream["error"] for stream in streams) == ["", error]
