"""Both generation doors of a real server, over HTTP and gRPC."""

from __future__ import annotations

import json
import time

import pytest

from tests.fakes.engine_runs import wait_until
from tests.fakes.fake_engine import expected_text
from tests.live.live_server import LiveServer
from tests.live.requests import (
    ADMIN_ARGUMENTS,
    EventStream,
    GrpcStream,
    admin,
    generate,
    metrics,
    post,
    run_threads,
    seconds_until_free,
    text_of,
    wait_until_running,
)

pytestmark = pytest.mark.live
DOORS = ("llm", "llm_vllm")
RETURN_ALL = {
    "return_finish_reason": True,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
    "return_cumulative_logprob": True,
    "return_logprobs": True,
}


@pytest.mark.parametrize("model", DOORS)
def test_same_text_on_every_way(fake_server: LiveServer, model: str):
    expected = expected_text("hello", 30)
    options = {"max_tokens": 30, "exclude_input_in_output": True}
    assert generate(fake_server, model, "hello", **options).body["text_output"] == expected
    events = list(EventStream(fake_server, model, "hello", max_tokens=30).events())
    assert "".join(event["text_output"] for event in events) == expected
    assert len(events) > 3
    with GrpcStream(fake_server, model) as stream:
        stream.submit("hello", stream=True, max_tokens=30)
        answers = stream.until_final()
        assert text_of(answers) == expected
        assert len(answers) > 3
        stream.submit("hello", **options)
        (answer,) = stream.until_final()
        assert text_of([answer]) == expected


@pytest.mark.parametrize("model", DOORS)
def test_outputs_on_request(fake_server: LiveServer, model: str):
    with GrpcStream(fake_server, model) as stream:
        stream.submit("hello", stream=True, max_tokens=12, logprobs=1, **RETURN_ALL)
        answers = stream.until_final()
    reasons = [answer.outputs["finish_reason"][0] for answer in answers]
    assert reasons == [b"None"] * (len(answers) - 1) + [b"length"]
    assert {answer.outputs["num_input_tokens"][0] for answer in answers} == {5}
    assert sum(answer.outputs["num_output_tokens"][0] for answer in answers) == 12
    assert answers[-1].outputs["cumulative_logprob"][0] == pytest.approx(-6.0)
    for answer in answers:
        rows = json.loads(answer.outputs["logprobs"][0])
        assert len(rows) == answer.outputs["num_output_tokens"][0]
        decoded = "".join(next(iter(row.values()))["decoded_token"] for row in rows)
        assert decoded == answer.outputs["text_output"][0].decode()


@pytest.mark.parametrize("model", DOORS)
def test_outputs_not_asked_for_are_left_out(fake_server: LiveServer, model: str):
    answer = generate(fake_server, model, "hello", max_tokens=3)
    assert set(answer.body) == {"model_name", "model_version", "text_output"}


@pytest.mark.parametrize("model", DOORS)
@pytest.mark.parametrize("stream", [False, True])
def test_n_samples_come_in_one_response(fake_server: LiveServer, model: str, stream: bool):
    with GrpcStream(fake_server, model) as connection:
        connection.submit("hello", stream=stream, exclude_input_in_output=True, max_tokens=9, n=3, **RETURN_ALL)
        answers = connection.until_final()
    assert stream or len(answers) == 1
    for sample in range(3):
        assert text_of(answers, sample) == expected_text("hello", 9, sample)
        assert sum(answer.outputs["num_output_tokens"][sample] for answer in answers) == 9
    assert answers[-1].outputs["finish_reason"] == [b"length"] * 3
    assert answers[-1].outputs["logprobs"] == [b"null"] * 3


def test_input_is_prepended_as_vllm_backend_does(fake_server: LiveServer):
    text = expected_text("hello", 4)
    assert generate(fake_server, "llm", "hello", max_tokens=4).body["text_output"] == text
    assert generate(fake_server, "llm_vllm", "hello", max_tokens=4).body["text_output"] == "hello" + text
    for model in DOORS:
        with_input = generate(fake_server, model, "hello", max_tokens=4, exclude_input_in_output=False)
        assert with_input.body["text_output"] == "hello" + text
        refused = generate(fake_server, model, "hello", max_tokens=4, exclude_input_in_output=False, stream=True)
        assert refused.body["error"].startswith("[INVALID_ARG] exclude_input_in_output")


def test_default_max_tokens(fake_server: LiveServer):
    (count,) = [generate(fake_server, "llm_vllm", "hello", return_num_output_tokens=True).body["num_output_tokens"]]
    assert count == 16
    body = generate(fake_server, "llm", "<eos:40>", return_finish_reason=True, return_num_output_tokens=True).body
    assert (body["finish_reason"], body["num_output_tokens"]) == ("stop", 41)


def test_options_in_the_tensor_sampling_parameters(fake_server: LiveServer):
    parameters = json.dumps({"max_tokens": "7", "temperature": "0"})
    answer = generate(fake_server, "llm_vllm", "hello", sampling_parameters=parameters, exclude_input_in_output=True)
    assert answer.body["text_output"] == expected_text("hello", 7)


@pytest.mark.parametrize("model", DOORS)
def test_messages_go_through_the_chat_template(fake_server: LiveServer, model: str):
    messages = json.dumps([{"role": "user", "content": "hi"}])
    answer = generate(fake_server, model, "", messages=messages, max_tokens=9, exclude_input_in_output=True)
    assert answer.body.get("text_output") == expected_text("user:hi\nassistant:", 9)


@pytest.mark.parametrize("model", DOORS)
def test_bad_input_disturbs_nobody(fake_server: LiveServer, model: str):
    with GrpcStream(fake_server, model) as good, GrpcStream(fake_server, model) as bad:
        good.submit("hello", stream=True, max_tokens=120)
        for _ in range(10):
            bad.submit(b"\xff\xfe", stream=True)
            error = bad.next()
            assert error.error.startswith("[INVALID_ARG] text_input: not valid UTF-8 at byte 0")
        assert text_of(good.until_final()) == expected_text("hello", 120)


def test_images_are_refused(fake_server: LiveServer):
    answer = generate(fake_server, "llm_vllm", "hello", image=["aGk="])
    assert answer.body["error"].startswith("[INVALID_ARG] image: not supported")


@pytest.mark.parametrize("model", DOORS)
def test_timeout_cancels(fake_server: LiveServer, model: str):
    began = time.monotonic()
    answer = generate(fake_server, model, "<silent>", max_tokens=100, timeout=0.3, return_finish_reason=True)
    assert answer.body["finish_reason"] == "cancelled"
    assert 0.3 <= time.monotonic() - began < 1.3
    assert seconds_until_free(fake_server, 1.0) < 1.0


@pytest.mark.parametrize("model", DOORS)
def test_64_streams_at_once(fake_server: LiveServer, model: str):
    def run(index: int) -> str:
        with GrpcStream(fake_server, model) as stream:
            stream.submit(f"prompt {index}", stream=True, max_tokens=400)
            return text_of(stream.until_final())

    assert run_threads(64, run) == [expected_text(f"prompt {index}", 400) for index in range(64)]
    assert admin(fake_server, "stats")["peak_running_requests"] >= 64
    assert seconds_until_free(fake_server, 1.0) < 1.0


@pytest.mark.parametrize("model", DOORS)
def test_64_requests_on_one_stream(fake_server: LiveServer, model: str):
    with GrpcStream(fake_server, model) as stream:
        for index in range(64):
            stream.submit(f"prompt {index}", request_id=str(index), stream=True, max_tokens=30 + index)
        texts = {str(index): "" for index in range(64)}
        finished = 0
        while finished < 64:
            answer = stream.next()
            texts[answer.request_id] += text_of([answer])
            finished += answer.is_final
    assert texts == {str(index): expected_text(f"prompt {index}", 30 + index) for index in range(64)}


@pytest.mark.parametrize("way", ["grpc", "http"])
@pytest.mark.parametrize("prompt", ["hello", "<silent>"])
@pytest.mark.parametrize("model", DOORS)
def test_cancellation_frees_blocks_within_a_second(fake_server: LiveServer, model: str, prompt: str, way: str):
    if way == "grpc":
        stream = GrpcStream(fake_server, model)
        stream.submit(prompt, stream=True, max_tokens=4000)
        wait_until_running(fake_server)
        stream.cancel()
    else:
        events = EventStream(fake_server, model, prompt, max_tokens=4000)
        wait_until_running(fake_server)
        events.close()
    assert seconds_until_free(fake_server, 5.0) < 1.0


@pytest.mark.parametrize("model", DOORS)
def test_cancellation_leaves_others_alone(fake_server: LiveServer, model: str):
    with GrpcStream(fake_server, model) as kept:
        kept.submit("kept", stream=True, max_tokens=200)
        dropped = [EventStream(fake_server, model, f"dropped {index}", max_tokens=4000) for index in range(6)]
        wait_until_running(fake_server, 7)
        for stream in dropped:
            stream.close()
        assert text_of(kept.until_final()) == expected_text("kept", 200)
    assert seconds_until_free(fake_server, 1.0) < 1.0


def test_metrics_follow_within_a_second(fake_server: LiveServer):
    # A door gives up what earlier tests have cancelled some seconds later.
    wait_until(lambda: metrics(fake_server)["trident_door_requests"] == 0)
    time.sleep(0.7)
    before = metrics(fake_server)
    with GrpcStream(fake_server, "llm") as stream:
        stream.submit("hello", stream=True, max_tokens=150)
        wait_until_running(fake_server)
        time.sleep(0.7)
        during = metrics(fake_server)
        stream.until_final()
    time.sleep(0.7)
    after = metrics(fake_server)
    assert (during["trident_running_requests"], after["trident_running_requests"]) == (1, 0)
    assert during["trident_kv_blocks_used"] > 0
    assert after["trident_output_tokens_total"] == before["trident_output_tokens_total"] + 150
    assert after["trident_prompt_tokens_total"] == before["trident_prompt_tokens_total"] + 5
    assert (after["trident_engine_ready"], after["trident_engine_restarts_total"]) == (1, 0)
    assert (during["trident_doors"], during["trident_door_requests"], after["trident_door_requests"]) == (7, 1, 0)
    names = ("requests_accepted_total", "requests_finished_total", "request_params_n_count", "request_params_n_sum")
    for name in (f"trident_{name}" for name in names):
        assert after[name] == before[name] + 1, name
    assert during["trident_num_requests_running"] == 1 and 0 < during["trident_gpu_cache_usage_perc"] < 1
    assert after["trident_iteration_tokens_total_sum"] == before["trident_iteration_tokens_total_sum"] + 150
    assert after["trident_door_responses_total"] > before["trident_door_responses_total"]


def test_admin_commands(fake_server: LiveServer):
    assert admin(fake_server, "health") == {"ready": True, "engine_restarts": 0}
    assert admin(fake_server, "config")["admin_token"] == "set"
    assert admin(fake_server, "stats")["kv_blocks_total"] > 0
    path = "/v2/models/llm_admin/generate"
    refused = {
        "command: 'reboot' is not allowed; give one of config, health, stats": ("reboot", ADMIN_ARGUMENTS),
        'arguments: "admin_token" is missing or wrong': ("stats", '{"admin_token": "guess"}'),
        "arguments: not JSON": ("stats", "{"),
        "arguments: a JSON list": ("stats", "[]"),
        "arguments: 'depth' is not an argument": ("stats", '{"admin_token": "secret", "depth": 1}'),
    }
    for text, (command, arguments) in refused.items():
        answer = post(fake_server, path, command=command, arguments=arguments)
        assert answer.status == 400
        assert answer.body["error"].startswith(f"[INVALID_ARG] {text}")
    assert post(fake_server, path, command="health").status == 400
