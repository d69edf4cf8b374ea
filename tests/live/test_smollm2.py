"""SmolLM2 behind scripts/serve: equal texts on every way in, many streams, cancellation, bad input."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes.engine_runs import wait_until
from tests.live.requests import (
    EventStream,
    GrpcStream,
    HttpAnswer,
    admin,
    generate,
    metrics,
    run_threads,
    seconds_until_free,
    text_of,
    wait_until_running,
)
from tests.live.serving import Serving, serving
from tests.live.tensor_stream import TensorStream, inputs_of
from trident_client import BadRequest, TridentClient
from trident_llm import Engine, EngineConfig

pytestmark = pytest.mark.live
DOORS = ("llm", "llm_vllm")
SETTINGS = {"dtype": "fp32", "device": "cpu", "num_threads": 1, "max_model_len": 2048, "max_num_blocks": 1024}
"""In float32 a text does not depend on what else is in the batch. One thread leaves the other core to the server."""
FREE_SECONDS = 1.0
"""How long a cancelled request may hold what it has."""


@dataclass(frozen=True)
class Case:
    """A request; ``options`` are those of both doors."""

    prompt: str
    options: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 24})


CHAT = json.dumps([{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Name three colors."}])
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "max_tokens": 24, "ignore_eos": True}
CASES = [
    Case("The capital of France is"),
    Case("def fibonacci(n):\n"),
    Case("Le café où l'été — 日本語 🙂 "),
    Case("One, two, three, " * 40),
    Case("", {"messages": CHAT, "temperature": 0, "max_tokens": 24}),
    Case("Once upon a time", {**SAMPLED, "seed": 7}),
    Case("Once upon a time", {**SAMPLED, "seed": 8, "frequency_penalty": 0.5, "repetition_penalty": 1.1}),
    Case("", {"messages": CHAT, **SAMPLED, "seed": 7}),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    settings = [argument for key, value in SETTINGS.items() for argument in ("--set", f"{key}={value}")]
    with serving(tmp_path_factory.mktemp("smollm2"), *settings, "--set", "admin_token=secret") as server:
        yield server


@pytest.fixture(scope="module")
def engine(smollm2_gguf: Path) -> Iterator[Engine]:
    """The same engine in this process."""
    num_threads = torch.get_num_threads()
    with Engine(EngineConfig(model=str(smollm2_gguf), **SETTINGS)) as engine:
        yield engine
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def expected(engine: Engine) -> list[str]:
    """The text of each case, by the engine in this process."""

    def run(index: int) -> str:
        return "".join(output.text for output in engine.generate(CASES[index].prompt, **CASES[index].options))

    texts = run_threads(len(CASES), run)
    assert texts[0].startswith(" Paris") and len(set(texts)) == len(CASES)
    return texts


def ask_generate(server: Serving, door: str, case: Case) -> str:
    answer = generate(server, door, case.prompt, exclude_input_in_output=True, **case.options)
    assert answer.status == 200, answer.body
    return answer.body["text_output"]


def ask_generate_stream(server: Serving, door: str, case: Case) -> str:
    return "".join(event["text_output"] for event in EventStream(server, door, case.prompt, **case.options).events())


def ask_grpc(server: Serving, door: str, case: Case) -> str:
    with GrpcStream(server, door) as stream:
        stream.submit(case.prompt, stream=True, **case.options)
        return text_of(stream.until_final())


def ask_client(server: Serving, door: str, case: Case) -> str:
    """With the project's own client, which speaks to llm alone."""
    options = dict(case.options)
    prompt = json.loads(options.pop("messages", "null")) or case.prompt
    with TridentClient(server.grpc_url) as client:
        return client.generate(prompt, stream=False, **options).text


@pytest.mark.parametrize(
    ("ask", "door"),
    [(ask, door) for ask in (ask_generate, ask_generate_stream, ask_grpc) for door in DOORS] + [(ask_client, "llm")],
)
def test_the_text_is_the_same_on_every_way(
    server: Serving, expected: list[str], ask: Callable[[Serving, str, Case], str], door: str
) -> None:
    assert run_threads(len(CASES), lambda index: ask(server, door, CASES[index])) == expected


def test_samples_stops_logprobs_and_counts_are_those_of_the_library(server: Serving, engine: Engine) -> None:
    options = {**SAMPLED, "n": 2, "seed": 3, "logprobs": 2, "stop": [".", "zebra crossing"]}
    wanted = list(engine.generate("Once upon a time", stream=False, return_cumulative_logprob=True, **options))
    with TridentClient(server.grpc_url) as client:
        got = client.generate("Once upon a time", stream=False, return_cumulative_logprob=True, **options)
        stopped = client.generate("The capital of France is", stream=False, temperature=0, stop="answer is")
    assert [sample.text for sample in got.samples] == [output.text for output in wanted]
    assert got.samples[0].text != got.samples[1].text
    for sample, output in zip(got.samples, wanted, strict=True):
        assert sample.finish_reason == output.finish_reason
        assert sample.num_output_tokens == output.num_output_tokens == len(sample.logprobs)
        assert sample.cumulative_logprob == pytest.approx(output.cumulative_logprob, rel=1e-3)
        chosen = [next(iter(row.items())) for row in sample.logprobs]
        assert [int(token_id) for token_id, _ in chosen] == output.token_ids
        assert sum(entry["logprob"] for _, entry in chosen) == pytest.approx(sample.cumulative_logprob, rel=1e-3)
        assert all({1, 2} <= {entry["rank"] for entry in row.values()} for row in sample.logprobs)
    assert got.num_input_tokens == wanted[0].num_input_tokens == 4
    assert (stopped.text, stopped.finish_reason) == (" Paris.\n\nThe ", "stop")


def test_64_streams_at_once(server: Serving, expected: list[str]) -> None:
    """All finish with the texts they have alone, all run at the same time, and no block stays behind."""
    prompts = [index for index, case in enumerate(CASES) if case == Case(case.prompt)]
    seen: list[float] = []
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.1):
            seen.append(metrics(server)["trident_running_requests"])

    def run(index: int) -> bool:
        case = prompts[index % len(prompts)]
        answer = client.generate(CASES[case].prompt, temperature=0, max_tokens=24, request_priority=index)
        return "".join(chunk.text for chunk in answer) == expected[case]

    watcher = threading.Thread(target=watch)
    watcher.start()
    with TridentClient(server.grpc_url) as client:
        assert run_threads(64, run) == [True] * 64
    finished.set()
    watcher.join()
    assert max(seen) == 64
    assert seconds_until_free(server, 5.0) < FREE_SECONDS
    stats = admin(server, "stats")
    assert stats["peak_running_requests"] >= 64
    assert (stats["running_requests"], stats["waiting_requests"], stats["kv_blocks_used"]) == (0, 0, 0)


@pytest.mark.parametrize("way", ["grpc", "http"])
@pytest.mark.parametrize("door", DOORS)
def test_cancellation_frees_blocks_within_a_second(server: Serving, door: str, way: str) -> None:
    drop = start_stream(server, door, way)
    wait_until_running(server)
    drop()
    assert seconds_until_free(server, 5.0) < FREE_SECONDS
    drop_kept, drop = start_stream(server, door, "grpc"), start_stream(server, door, way)
    wait_until_running(server, 2)
    drop()
    began = time.monotonic()
    while admin(server, "stats")["running_requests"] != 1:
        assert time.monotonic() - began < FREE_SECONDS
        time.sleep(0.01)
    drop_kept()
    assert seconds_until_free(server, 5.0) < FREE_SECONDS


def start_stream(server: Serving, door: str, way: str) -> Callable[[], None]:
    """Begin a request that would take a minute; returns what cancels it."""
    options = {"max_tokens": 1500, "ignore_eos": True}
    if way == "http":
        return EventStream(server, door, "Once upon a time", **options).close
    stream = GrpcStream(server, door)
    stream.submit("Once upon a time", stream=True, **options)
    return stream.cancel


def test_metrics_count_what_vllm_backends_count(server: Serving) -> None:
    prompts, num_tokens = ("The most dangerous animal is", "The capital of France is", "The future of AI is"), 6
    # What was asked before is published within half a second.
    time.sleep(0.7)
    before = metrics(server)
    with TensorStream(server) as connection:
        for prompt in prompts:
            inputs = inputs_of(prompt, {"max_tokens": num_tokens, "ignore_eos": True}, return_num_input_tokens=True)
            connection.submit(inputs)
        num_input_tokens = sum(int(connection.next().tensors["num_input_tokens"][0]) for _ in prompts)

    def counted(name: str) -> float:
        return metrics(server)[f"trident_{name}"] - before[f"trident_{name}"]

    num_requests, num_output_tokens = len(prompts), len(prompts) * num_tokens
    wait_until(lambda: counted("e2e_request_latency_seconds_count") == num_requests)
    expected = {
        "prompt_tokens_total": num_input_tokens,
        "generation_tokens_total": num_output_tokens,
        "time_to_first_token_seconds_count": num_requests,
        "time_per_output_token_seconds_count": num_output_tokens - num_requests,
        "request_prompt_tokens_count": num_requests,
        "request_prompt_tokens_sum": num_input_tokens,
        "request_generation_tokens_count": num_requests,
        "request_generation_tokens_sum": num_output_tokens,
        "request_params_n_count": num_requests,
        "request_params_n_sum": num_requests,
    }
    assert {name: counted(name) for name in expected} == expected
    times = ("time_to_first_token", "time_per_output_token", "e2e_request_latency")
    assert all(counted(f"{name}_seconds_sum") > 0 for name in times)


BAD = {
    "empty prompt": ({"prompt": ""}, "text_input: empty"),
    "long prompt": ({"prompt": "word " * 3000}, "text_input: 3001 tokens; at most 2047 are allowed"),
    "huge prompt": ({"prompt": "x" * 10_000_000}, "text_input: at least 10000000 bytes; at most 4194304"),
    "no tokens": ({"max_tokens": 0}, "max_tokens: 0 is not allowed; give an integer of at least 1"),
    "negative tokens": ({"max_tokens": -4}, "max_tokens: -4 is not allowed"),
    "words for a number": ({"max_tokens": "abc"}, "max_tokens: 'abc' is not allowed"),
    "no number": ({"temperature": "NaN"}, "temperature: 'NaN' is not allowed; give a number from 0 to 2"),
    "unknown option": ({"temprature": 1}, "unknown option 'temprature'; did you mean 'temperature'?"),
    "no messages": ({"prompt": "", "messages": "hello"}, "messages: "),
    "both": ({"messages": CHAT}, "text_input: must be empty when messages is given"),
    "1,000 stop strings": ({"stop": json.dumps([str(i) for i in range(1000)])}, "stop: "),
    "too many samples": ({"n": 17}, "n: 17 is not allowed; give an integer from 1 to 16"),
    "too many logprobs": ({"logprobs": 21}, "logprobs: 21 is not allowed; give an integer from 0 to 20"),
}


@pytest.mark.parametrize("door", DOORS)
def test_bad_input_is_named_and_disturbs_nobody(server: Serving, expected: list[str], door: str) -> None:
    with GrpcStream(server, door) as good, GrpcStream(server, door) as bad:
        good.submit(CASES[0].prompt, stream=True, **CASES[0].options)
        for name, (fields, text) in BAD.items():
            request = {"prompt": "Hello", **fields}
            over_http = generate(server, door, **request)
            assert over_http.status == 400, name
            assert over_http.body["error"].startswith(f"[INVALID_ARG] {text}"), name
            bad.submit(**request, stream=True)
            assert bad.next(timeout=60).error.startswith(f"[INVALID_ARG] {text}"), name
        not_utf8 = "[INVALID_ARG] text_input: not valid UTF-8 at byte 3 (ff"
        assert post_bytes(server, door, b'{"text_input": "caf\xff"}').body["error"].startswith(not_utf8)
        bad.submit(b"caf\xff")
        assert bad.next().error.startswith(not_utf8)
        assert text_of(good.until_final()) == expected[0]
    assert seconds_until_free(server, 5.0) < FREE_SECONDS


def test_a_number_that_is_none_is_refused(server: Serving) -> None:
    with TridentClient(server.grpc_url) as client, pytest.raises(BadRequest, match=r"temperature: nan is not allowed"):
        client.generate("Hello", stream=False, temperature=float("nan"))


def post_bytes(server: Serving, door: str, body: bytes) -> HttpAnswer:
    """A refused request whose body is no text."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{server.http_url}/v2/models/{door}/generate", body, timeout=60)
    return HttpAnswer(caught.value.code, json.loads(caught.value.read()))
