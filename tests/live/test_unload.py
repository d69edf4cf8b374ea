"""Models that are unloaded, and loaded anew, while their requests run: a server whose drain_timeout is 1 s."""

from __future__ import annotations

import json
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpcclient

from tests.fakes.byte_tokenizer import write_byte_tokenizer
from tests.fakes.engine_runs import wait_until
from tests.fakes.fake_engine import expected_text
from tests.live.live_server import LiveServer, fake_repository, serve, serve_fake
from tests.live.requests import (
    Answer,
    EventStream,
    GrpcStream,
    HttpAnswer,
    generate,
    metrics,
    num_doors,
    text_of,
    wait_until_running,
)
from trident_llm.server.engine_watch import wait_for_end

pytestmark = pytest.mark.live
ARGUMENTS = ("--doors", "2", "--set", "max_queue_size=256", "--set", "admin_token=secret", "--set", "drain_timeout=1")
CUT = "[UNAVAILABLE] the model is being unloaded; retry after 2 s"
CUT_AFTER = (0.9, 2.0)
"""Seconds from the unload on: drain_timeout, and what it takes to notice."""
UNLOADED_AFTER = 5.0
"""Seconds from the cut on. The Triton server takes 1.2 s for each door."""
SLOW_END = """

class TritonPythonModel(TritonPythonModel):
    def finalize(self):
        super().finalize()
        __import__("time").sleep(1.0)
"""
"""Lets other doors take over from one that has ended before its process has."""
OTHERS = {"llm": "llm_vllm", "llm_vllm": "llm"}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    arguments = (*ARGUMENTS, "--only", "llm,llm_vllm,llm_admin")
    with tempfile.TemporaryDirectory() as folder, serve_fake(Path(folder), *arguments) as server:
        yield server


@pytest.fixture
def triton(server: LiveServer) -> Iterator[grpcclient.InferenceServerClient]:
    """The server's own API. All models are loaded when a test begins."""
    with server.grpc_client() as client:
        for model in OTHERS:
            if state(server, model) != "READY":
                client.load_model(model)
        yield client


def state(server: LiveServer, model: str) -> str:
    request = urllib.request.Request(f"{server.http_url}/v2/repository/index", data=b"{}", method="POST")
    with urllib.request.urlopen(request, timeout=10) as response:
        return next(entry["state"] for entry in json.load(response) if entry["name"] == model)


def config_of(server: LiveServer, model: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.http_url}/v2/models/{model}/config", timeout=10) as response:
        return json.load(response)


def other_config(server: LiveServer, model: str) -> str:
    """Settings that are not the engine's."""
    config = config_of(server, model)
    if model == "llm":
        config["max_batch_size"] += 1
    else:
        note = config["parameters"].setdefault("note", {"string_value": ""})
        note["string_value"] += "x"
    return json.dumps(config)


def until_cut(stream: GrpcStream, began: float) -> list[Answer]:
    """All answers, of which the last is the error, after the time that is allowed."""
    answers = stream.until_final()
    assert answers[-1].error == CUT
    assert CUT_AFTER[0] < time.monotonic() - began < CUT_AFTER[1]
    return answers[:-1]


# Without llm the engine ends, too.
@pytest.mark.parametrize(("model", "num_other_tokens"), [("llm", 80), ("llm_vllm", 400)])
def test_unload_ends_long_streams_after_drain_timeout(
    server: LiveServer, triton: grpcclient.InferenceServerClient, model: str, num_other_tokens: int
) -> None:
    whole: list[HttpAnswer] = []
    asking = threading.Thread(target=lambda: whole.append(generate(server, model, "whole", max_tokens=4000)))
    with GrpcStream(server, OTHERS[model]) as other:
        with GrpcStream(server, model) as long:
            long.submit("long", stream=True, max_tokens=4000)
            other.submit("other", stream=True, max_tokens=num_other_tokens)
            events = EventStream(server, model, "events", max_tokens=4000)
            asking.start()
            wait_until_running(server, 4)
            began = time.monotonic()
            triton.unload_model(model)
            assert generate(server, model, "late").status == 404
            text = text_of(until_cut(long, began))
            cut = time.monotonic()
        assert text == expected_text("long", 4000)[: len(text)] != ""
        assert list(events.events())[-1] == {"error": CUT}
        events.close()
        asking.join(1.0)
        assert whole[0].body["error"] == CUT
        wait_until(lambda: state(server, model) == "UNAVAILABLE", cut + UNLOADED_AFTER - time.monotonic())
        assert text_of(other.until_final()) == expected_text("other", num_other_tokens)
    triton.load_model(model)
    answer = generate(server, model, "hello", max_tokens=9, exclude_input_in_output=True)
    assert answer.body["text_output"] == expected_text("hello", 9)


@pytest.mark.parametrize("model", OTHERS)
def test_unload_lets_short_streams_finish(
    server: LiveServer, triton: grpcclient.InferenceServerClient, model: str
) -> None:
    with GrpcStream(server, model) as short:
        short.submit("short", stream=True, max_tokens=60)
        wait_until_running(server)
        began = time.monotonic()
        triton.unload_model(model)
        assert text_of(short.until_final()) == expected_text("short", 60)
    wait_until(lambda: state(server, model) == "UNAVAILABLE", began + 1 + UNLOADED_AFTER - time.monotonic())


def test_unload_of_the_owner_ends_streams_of_other_models_too(
    server: LiveServer, triton: grpcclient.InferenceServerClient
) -> None:
    with GrpcStream(server, "llm_vllm") as guest:
        guest.submit("guest", stream=True, max_tokens=4000)
        wait_until_running(server)
        began = time.monotonic()
        triton.unload_model("llm")
        (*_, last) = guest.until_final()
        assert last.error == "[UNAVAILABLE] the model that owns the engine is not loaded; retry after 2 s"
        assert time.monotonic() - began < 1 + UNLOADED_AFTER
    wait_until(lambda: state(server, "llm") == "UNAVAILABLE", 1.0)


def test_the_engine_of_an_idle_model_ends_before_the_last_door(
    server: LiveServer, triton: grpcclient.InferenceServerClient
) -> None:
    engine = server.find_process("fake_engine")
    triton.unload_model("llm")
    assert wait_for_end(engine.pid, UNLOADED_AFTER)
    assert state(server, "llm") == "UNLOADING"
    wait_until(lambda: state(server, "llm") == "UNAVAILABLE", UNLOADED_AFTER)


def test_an_open_connection_does_not_keep_the_engine(
    server: LiveServer, triton: grpcclient.InferenceServerClient
) -> None:
    with GrpcStream(server, "llm") as kept:
        kept.submit("kept", stream=True, max_tokens=4000)
        wait_until_running(server)
        engine = server.find_process("fake_engine")
        began = time.monotonic()
        triton.unload_model("llm")
        until_cut(kept, began)
        assert wait_for_end(engine.pid, UNLOADED_AFTER)
        assert state(server, "llm") == "UNLOADING"
        triton.load_model("llm")
        answer = generate(server, "llm", "hello", max_tokens=9)
        assert answer.body["text_output"] == expected_text("hello", 9)
    wait_until(lambda: num_doors(server, "llm") == 2, UNLOADED_AFTER)
    answer = generate(server, "llm", "hello", max_tokens=9)
    assert answer.body["text_output"] == expected_text("hello", 9)


@pytest.mark.parametrize("model", OTHERS)
def test_streams_of_the_old_load_get_drain_timeout_while_the_new_one_serves(
    server: LiveServer, triton: grpcclient.InferenceServerClient, model: str
) -> None:
    with GrpcStream(server, model) as long, GrpcStream(server, OTHERS[model]) as other:
        long.submit("long", stream=True, max_tokens=4000)
        other.submit("other", stream=True, max_tokens=1000)
        wait_until_running(server, 2)
        triton.load_model(model, config=other_config(server, model))
        began = time.monotonic()
        with GrpcStream(server, model) as new:
            new.submit("new", stream=True, max_tokens=400)
            answers = long.until_final()
            assert answers[-1].error == CUT
            # New doors are there a moment before the load returns, and are looked for twice.
            assert 0.3 < time.monotonic() - began < 3.0
            text = text_of(answers[:-1])
            assert text == expected_text("long", 4000)[: len(text)] and len(text) > 200
            assert text_of(new.until_final()) == expected_text("new", 400)
        assert text_of(other.until_final()) == expected_text("other", 1000)
    wait_until(lambda: num_doors(server, model) == 2, UNLOADED_AFTER)


def test_a_load_that_fails_harms_no_stream(server: LiveServer, triton: grpcclient.InferenceServerClient) -> None:
    config = config_of(server, "llm")
    config["parameters"]["block_size"] = {"string_value": "32"}
    with GrpcStream(server, "llm") as stream:
        stream.submit("long", stream=True, max_tokens=700)
        wait_until_running(server)
        with pytest.raises(Exception, match="the engine still runs with other settings; unload the model first"):
            triton.load_model("llm", config=json.dumps(config))
        assert text_of(stream.until_final()) == expected_text("long", 700)


def test_metrics_go_over_to_another_door(tmp_path: Path) -> None:
    repository = fake_repository(tmp_path, "--step-time 0.01")
    for code in repository.glob("*/1/model.py"):
        code.write_text(code.read_text() + SLOW_END)
    tokenizer = write_byte_tokenizer(tmp_path / "model")
    arguments = ("--model-repository", str(repository), "--model", str(tokenizer), *ARGUMENTS)
    with serve(*arguments, "--only", "llm,llm_vllm,llm_admin") as server, server.grpc_client() as triton:
        generate(server, "llm_vllm", "hello", max_tokens=30)
        server.find_process("fake_engine").kill()
        generate(server, "llm", "hello", max_tokens=30)
        time.sleep(0.7)
        before = metrics(server)
        for _ in range(2):
            holder = server.find_process("fake_engine").parent()
            assert holder is not None
            model = holder.cmdline()[-2].rpartition("_0_")[0]
            triton.load_model(model, config=other_config(server, model))
            wait_until(lambda holder=holder: not holder.is_running(), 15.0)
            server.find_process("fake_engine").kill()
            time.sleep(1.5)
        generate(server, "llm", "hello", max_tokens=20)
        time.sleep(0.7)
        # Doors of an old load end one after the other.
        wait_until(lambda: metrics(server)["trident_doors"] == before["trident_doors"], 15.0)
        after = metrics(server)
        for model in (*OTHERS, "llm_admin"):
            triton.unload_model(model)
        wait_until(lambda: not metrics(server), 15.0)
    assert after.keys() == before.keys()
    changes = {
        "trident_output_tokens_total": 20,
        "trident_requests_accepted_total": 1,
        "trident_engine_restarts_total": 2,
        "trident_engine_ready": 0,
        "trident_doors": 0,
    }
    assert {name: after[name] - before[name] for name in changes} == changes
