"""Requests of vllm_backend's clients to llm_vllm: tensors, additional outputs, streams, cancellation, errors."""

from __future__ import annotations

import asyncio
import itertools
import json
import queue
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as aioclient
from tritonclient.utils import InferenceServerException

from tests.fakes.fake_engine import expected_text
from tests.live.live_server import LiveServer
from tests.live.requests import EventStream, generate, post, seconds_until_free, wait_until_running
from tests.live.tensor_stream import OUTPUT_TYPES, Response, TensorStream, inputs_of, tensor

pytestmark = pytest.mark.live
PROMPT = "In short,"
NUM_TOKENS = 4
MAX_TOKENS = {"max_tokens": str(NUM_TOKENS)}
FLAGS = (
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
)
IN_FLIGHT = 48
"""Requests at once, where a test sends many."""


def test_the_tensors_are_those_of_vllm_backend(fake_server: LiveServer) -> None:
    with fake_server.grpc_client() as client:
        config = client.get_model_config("llm_vllm", as_json=True)["config"]
    strings = {"text_input", "image", "sampling_parameters", "embedding_request"}
    booleans = {"stream", "exclude_input_in_output", *FLAGS}
    assert {spec["name"]: spec["data_type"] for spec in config["input"]} == {
        **dict.fromkeys(strings, "TYPE_STRING"), **dict.fromkeys(booleans, "TYPE_BOOL")
    }  # fmt: skip
    assert {spec["name"] for spec in config["input"] if not spec.get("optional")} == {"text_input"}
    assert {spec["name"] for spec in config["input"] if spec["dims"] != ["1"]} == {"image"}
    names = {np.object_: "TYPE_STRING", np.float32: "TYPE_FP32", np.uint32: "TYPE_UINT32"}
    outputs = {spec["name"]: (spec["data_type"], spec["dims"]) for spec in config["output"]}
    for name, kind in OUTPUT_TYPES.items():
        assert outputs[name] == (names[kind], ["1" if name == "num_input_tokens" else "-1"])
    assert config["model_transaction_policy"]["decoupled"] and not config.get("max_batch_size")


def combinations() -> Iterator[dict[str, Any]]:
    """Each flag absent, true and false, with logprobs absent, 0 and 2."""
    for logprobs, *values in itertools.product([None, 0, 2], *[[None, True, False]] * len(FLAGS)):
        yield {"logprobs": logprobs, **dict(zip(FLAGS, values, strict=True))}


@pytest.mark.parametrize("stream", [False, True])
def test_additional_outputs(fake_server: LiveServer, stream: bool) -> None:
    asked = {str(index): combination for index, combination in enumerate(combinations())}
    responses: dict[str, list[Response]] = defaultdict(list)
    waiting = iter(asked.items())

    def submit_one() -> None:
        for request_id, combination in itertools.islice(waiting, 1):
            flags = {name: combination[name] for name in FLAGS}
            logprobs = {} if combination["logprobs"] is None else {"logprobs": combination["logprobs"]}
            connection.submit(inputs_of(PROMPT, {**MAX_TOKENS, **logprobs}, stream=stream, **flags), request_id)

    with TensorStream(fake_server) as connection:
        for _ in range(IN_FLIGHT):
            submit_one()
        finished = 0
        while finished < len(asked):
            response = connection.next()
            assert response.error is None, response.error
            responses[response.request_id].append(response)
            if response.is_final:
                finished += 1
                submit_one()
        assert connection.is_silent
    for request_id, combination in asked.items():
        check_outputs(combination, stream, responses[request_id])


def check_outputs(asked: dict[str, Any], stream: bool, responses: list[Response]) -> None:
    assert [response.is_final for response in responses] == [False] * (len(responses) - 1) + [True]
    assert stream or len(responses) == 1
    expected = {"text_output", *(name.removeprefix("return_") for name in FLAGS if asked[name])}
    for response in responses:
        assert set(response.tensors) == expected
        assert all(array.shape == (1,) for array in response.tensors.values())
        assert all(array.dtype == OUTPUT_TYPES[name] for name, array in response.tensors.items())
    prefix = "" if stream else PROMPT
    assert "".join(response.text() for response in responses) == prefix + expected_text(PROMPT, NUM_TOKENS)
    if asked["return_finish_reason"]:
        reasons = [response.text("finish_reason") for response in responses]
        assert reasons == ["None"] * (len(responses) - 1) + ["length"]
    if asked["return_cumulative_logprob"]:
        sums = [response.tensors["cumulative_logprob"][0] for response in responses]
        assert sums[-1] == pytest.approx(-0.5 * NUM_TOKENS) and sums == sorted(set(sums), reverse=True)
    if asked["return_num_input_tokens"]:
        assert {int(response.tensors["num_input_tokens"][0]) for response in responses} == {len(PROMPT)}
    if asked["return_num_output_tokens"]:
        counts = [int(response.tensors["num_output_tokens"][0]) for response in responses]
        assert sum(counts) == NUM_TOKENS and min(counts) > 0
    if asked["return_logprobs"]:
        for response in responses:
            check_logprobs(asked["logprobs"], response, prefix)


def check_logprobs(num_top: int | None, response: Response, prefix: str) -> None:
    rows = json.loads(response.text("logprobs"))
    if num_top is None:
        assert rows is None
        return
    if "num_output_tokens" in response.tensors:
        assert len(rows) == response.tensors["num_output_tokens"][0]
    chosen = ""
    for row in rows:
        assert 1 <= len(row) <= num_top + 1
        assert all(set(entry) == {"logprob", "rank", "decoded_token"} for entry in row.values())
        assert all(isinstance(entry["logprob"], float) and token_id.isdigit() for token_id, entry in row.items())
        (best,) = [entry for entry in row.values() if entry["rank"] == 1]
        chosen += best["decoded_token"]
    assert prefix + chosen == response.text()


def test_outputs_have_an_element_for_each_sample(fake_server: LiveServer) -> None:
    parameters = {**MAX_TOKENS, "n": "3", "temperature": "1", "logprobs": 1}
    with TensorStream(fake_server) as connection:
        response = connection.answer(inputs_of(PROMPT, parameters, **dict.fromkeys(FLAGS, True)))
    shapes = {name: array.shape for name, array in response.tensors.items()}
    assert shapes == {**dict.fromkeys(OUTPUT_TYPES, (3,)), "num_input_tokens": (1,)}
    texts = [PROMPT + expected_text(PROMPT, NUM_TOKENS, sample) for sample in range(3)]
    assert [text.decode() for text in response.tensors["text_output"]] == texts


@pytest.mark.parametrize(
    ("stream", "exclude", "prefix"),
    [(False, None, PROMPT), (False, False, PROMPT), (False, True, ""), (True, None, ""), (True, True, "")],
)
def test_the_prompt_in_the_output(fake_server: LiveServer, stream: bool, exclude: bool | None, prefix: str) -> None:
    with TensorStream(fake_server) as connection:
        connection.submit(inputs_of(PROMPT, MAX_TOKENS, stream=stream, exclude_input_in_output=exclude))
        responses = [connection.next()]
        while not responses[-1].is_final:
            responses.append(connection.next())
    assert "".join(response.text() for response in responses) == prefix + expected_text(PROMPT, NUM_TOKENS)


def test_the_prompt_is_not_streamed(fake_server: LiveServer) -> None:
    with TensorStream(fake_server) as connection:
        refused = connection.answer(inputs_of(PROMPT, stream=True, exclude_input_in_output=False))
    assert refused.error is not None
    text = "exclude_input_in_output: false is not allowed with stream; give true, or stream false"
    assert refused.error.message() == f"[INVALID_ARG] {text}"


@pytest.mark.parametrize(
    ("carried", "parameters", "num_tokens"),
    [
        ({"max_tokens": "5"}, None, 5),
        (None, {"max_tokens": "6", "temperature": "0"}, 6),
        ({"max_tokens": 7, "top_p": 1}, {"max_tokens": 3, "temperature": "0"}, 7),
        ({"temperature": "0", "top_p": "1"}, {"temperature": "0", "top_p": "1"}, 16),
        ({}, None, 16),
    ],
    ids=["tensor", "parameters", "both", "equal", "neither"],
)
def test_sampling_parameters_come_in_a_tensor_or_as_parameters(
    fake_server: LiveServer, carried: dict[str, object] | None, parameters: dict[str, object] | None, num_tokens: int
) -> None:
    """The tensor wins."""
    with TensorStream(fake_server) as connection:
        inputs = inputs_of(PROMPT, carried, exclude_input_in_output=True)
        assert connection.answer(inputs, parameters=parameters).text() == expected_text(PROMPT, num_tokens)
    options = {**(parameters or {}), "sampling_parameters": json.dumps(carried or {}), "exclude_input_in_output": True}
    assert generate(fake_server, "llm_vllm", PROMPT, **options).body["text_output"] == expected_text(PROMPT, num_tokens)


def test_only_outputs_that_are_named(fake_server: LiveServer) -> None:
    with TensorStream(fake_server) as connection:
        inputs = inputs_of(PROMPT, return_finish_reason=True, return_num_input_tokens=True)
        response = connection.answer(inputs, outputs=["text_output", "num_input_tokens"])
    assert set(response.tensors) == {"text_output", "num_input_tokens"}


def test_a_request_of_tritons_openai_frontend(fake_server: LiveServer) -> None:
    parameters = {
        "frequency_penalty": 0.0, "presence_penalty": 0.0, "n": 1, "temperature": 0.7, "top_p": 1.0, "seed": 3,
        "stop": ["\n\n"], "ignore_eos": False, "min_tokens": 0, "max_tokens": 9, "logprobs": 2,
    }  # fmt: skip
    flags = ("return_logprobs", "return_num_input_tokens", "return_num_output_tokens")
    with TensorStream(fake_server) as connection:
        inputs = inputs_of(PROMPT, parameters, stream=False, exclude_input_in_output=True, **dict.fromkeys(flags, True))
        response = connection.answer(inputs)
    assert response.text() == expected_text(PROMPT, 9)
    assert len(json.loads(response.text("logprobs"))) == response.tensors["num_output_tokens"][0] == 9


def test_several_prompts_with_the_asyncio_client(fake_server: LiveServer) -> None:
    prompts = ["The most", "The capital", "The future"]

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for index, prompt in enumerate(prompts):
            inputs = inputs_of(prompt, {"max_tokens": "20"}, stream=True)
            yield {"model_name": "llm_vllm", "inputs": inputs, "request_id": str(index)}

    async def collect() -> dict[str, list[str]]:
        pieces: dict[str, list[str]] = defaultdict(list)
        async with aioclient.InferenceServerClient(fake_server.grpc_url) as client:
            async for result, error in client.stream_infer(requests()):
                assert error is None
                pieces[result.get_response().id].append(result.as_numpy("text_output")[0].decode())
        return pieces

    pieces = asyncio.run(collect())
    assert all(len(parts) > 3 for parts in pieces.values())
    texts = {request_id: "".join(parts) for request_id, parts in pieces.items()}
    assert texts == {str(index): expected_text(prompt, 20) for index, prompt in enumerate(prompts)}


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_request_ends_with_one_error_and_frees_what_it_had(fake_server: LiveServer, stream: bool) -> None:
    with TensorStream(fake_server) as connection:
        connection.submit(inputs_of(PROMPT, {"max_tokens": "1500"}, stream=stream), "1")
        wait_until_running(fake_server)
        connection.cancel()
        assert seconds_until_free(fake_server, 5.0) < 1.0
        response = connection.next()
        while response.error is None:
            response = connection.next()
        assert response.error.status() == "StatusCode.CANCELLED"
        assert connection.is_silent


def test_unary_calls_are_refused_by_the_server(fake_server: LiveServer) -> None:
    """As for every decoupled model."""
    errors: queue.SimpleQueue[InferenceServerException] = queue.SimpleQueue()
    inputs = inputs_of(PROMPT)
    with fake_server.grpc_client() as client:
        with pytest.raises(InferenceServerException, match="decoupled") as caught:
            client.infer("llm_vllm", inputs)
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
        client.async_infer("llm_vllm", inputs, lambda result, error: errors.put(error))
        assert errors.get(timeout=10).status() == "StatusCode.UNIMPLEMENTED"
    body = {"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": [PROMPT]}]}
    refused = post(fake_server, "/v2/models/llm_vllm/infer", **body)
    assert refused.status >= 400 and "decoupled" in refused.body["error"]


def test_generate_answers_in_json(fake_server: LiveServer) -> None:
    options: dict[str, object] = {**MAX_TOKENS, **dict.fromkeys(FLAGS, True)}
    body = generate(fake_server, "llm_vllm", PROMPT, exclude_input_in_output=True, logprobs=0, **options).body
    text = expected_text(PROMPT, NUM_TOKENS)
    assert "".join(next(iter(row.values()))["decoded_token"] for row in json.loads(body.pop("logprobs"))) == text
    assert body == {
        "model_name": "llm_vllm", "model_version": "1", "text_output": text, "finish_reason": "length",
        "cumulative_logprob": -0.5 * NUM_TOKENS, "num_input_tokens": len(PROMPT), "num_output_tokens": NUM_TOKENS,
    }  # fmt: skip
    samples = generate(fake_server, "llm_vllm", PROMPT, n=2, **options).body
    assert samples["finish_reason"] == ["length"] * 2 and samples["num_input_tokens"] == len(PROMPT)


def test_generate_stream_sends_an_event_for_each_piece(fake_server: LiveServer) -> None:
    options = {"max_tokens": 20, "return_finish_reason": True, "return_num_output_tokens": True}
    events = list(EventStream(fake_server, "llm_vllm", PROMPT, **options).events())
    assert "".join(event["text_output"] for event in events) == expected_text(PROMPT, 20)
    assert [event["finish_reason"] for event in events] == ["None"] * (len(events) - 1) + ["length"]
    assert sum(event["num_output_tokens"] for event in events) == 20
    began = time.monotonic()
    refused = generate(fake_server, "llm_vllm", PROMPT, max_tokens=20, stream=True)
    assert "exactly 1 response" in refused.body["error"] and time.monotonic() - began < 1.0


WRONG = {
    "another type": ([tensor("text_input", [PROMPT]), tensor("stream", [np.int32(1)])], ("'stream'", "INT32", "BOOL")),
    "a number as prompt": ([tensor("text_input", [np.int32(1)])], ("'text_input'", "INT32", "BYTES")),
    "two prompts": ([tensor("text_input", [PROMPT, PROMPT])], ("'text_input'", "Expected [1], got [2]")),
    "two flags": ([tensor("text_input", [PROMPT]), tensor("stream", [True, True])], ("'stream'", "got [2]")),
    "no prompt": ([tensor("stream", [False])], ("text_input: empty; give at least one character of text",)),
    "an unknown input": ([tensor("text_input", [PROMPT]), tensor("strem", [True])], ("'strem'", "'llm_vllm'")),
    "an image": ([tensor("text_input", [PROMPT]), tensor("image", ["aGk="])], ("[INVALID_ARG] image: not supported",)),
    "an embedding": (
        [tensor("text_input", [PROMPT]), tensor("embedding_request", ['{"input": "hi"}'])],
        ("[INVALID_ARG] embedding_request: not supported; this server generates text only",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_named(fake_server: LiveServer, case: str) -> None:
    inputs, words = WRONG[case]
    with TensorStream(fake_server) as connection:
        refused = connection.answer(inputs)
        assert refused.error is not None
        assert all(word in refused.error.message() for word in words), refused.error
        assert connection.answer(inputs_of(PROMPT, MAX_TOKENS)).text() == PROMPT + expected_text(PROMPT, NUM_TOKENS)


def test_unknown_models_and_outputs_are_named(fake_server: LiveServer) -> None:
    with TensorStream(fake_server) as connection:
        assert "'perplexity'" in str(connection.answer(inputs_of(PROMPT), outputs=["perplexity"]).error)
    with TensorStream(fake_server, "nobody") as connection:
        assert "'nobody' is not found" in str(connection.answer(inputs_of(PROMPT)).error)
