"""Requests and answers as protobuf messages."""

import asyncio
import json
import struct
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from tests.fakes.fake_triton import Fail, FakeTriton
from trident_client import AsyncTridentClient, BadRequest, Chunk, Completion, EngineFailed, NotFound, TridentClient
from trident_client.wire import AnswerDecoder, admin_request, check_url, generate_request


def parameters(prompt: Any = "Hi", stream: bool = True, **options: Any) -> dict[str, Any]:
    request = generate_request("llm", prompt, stream, options)
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in request.parameters.items()}


def test_a_prompt_is_the_only_input_and_has_a_batch_dimension():
    request = generate_request("llm", "Grüße", True, {})
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in request.inputs] == [
        ("text_input", "BYTES", [1, 1])
    ]
    assert list(request.inputs[0].contents.bytes_contents) == ["Grüße".encode()]


def test_finish_reason_and_counts_are_asked_for_unless_the_caller_says_no():
    given = parameters(stream=False, return_num_input_tokens=False)
    assert given == {
        "triton_enable_empty_final_response": True,
        "stream": False,
        "return_finish_reason": True,
        "return_num_input_tokens": False,
        "return_num_output_tokens": True,
    }


def test_logprobs_are_returned_when_they_are_computed():
    assert parameters(logprobs=0)["return_logprobs"] is True
    assert "return_logprobs" not in parameters(logprobs=None)


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (True, True),
        (np.bool_(False), False),
        (7, 7),
        (np.int32(7), 7),
        (2**64 - 1, "18446744073709551615"),
        (0.25, 0.25),
        (np.float32(0.25), 0.25),
        ("text", "text"),
        (["a", "ü"], '["a", "ü"]'),
        ((1, 2), "[1, 2]"),
        ({5: -1.5}, '{"5": -1.5}'),
    ],
)
def test_options_travel_in_the_type_that_fits(value: Any, sent: Any):
    got = parameters(anything=value)["anything"]
    assert got == sent
    assert type(got) is type(sent)


def test_none_is_not_sent():
    assert "seed" not in parameters(seed=None)


def test_one_stop_string_travels_as_json_so_that_brackets_stay_text():
    assert json.loads(parameters(stop="[1]")["stop"]) == ["[1]"]


def test_messages_leave_the_prompt_empty():
    messages = [{"role": "user", "content": "¿Qué?"}]
    request = generate_request("llm", messages, True, {})
    assert request.inputs[0].contents.bytes_contents[0] == b""
    assert json.loads(request.parameters["messages"].string_param) == messages


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": object()}, ["temperature", "object", "number"]),
        ({"stop": b"x"}, ["stop", "bytes"]),
        ({"seed": 2**64}, ["seed", "64 bits"]),
        ({"stop": ["\ud800"]}, ["stop", "surrogate"]),
        ({"logit_bias": {"1": object()}}, ["logit_bias", "JSON"]),
        ({"priority": 1}, ["priority", "request_priority"]),
        ({"messages": "[]"}, ["messages", "first argument"]),
        ({"sequence_id": 1}, ["sequence_id"]),
        ({"triton_x": 1}, ["triton_x"]),
    ],
)
def test_what_cannot_travel_is_refused_by_name(options: dict[str, Any], words: list[str]):
    with pytest.raises(BadRequest) as caught:
        parameters(**options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("prompt", [b"bytes", 3, ["no message"], None, {"role": "user"}])
def test_a_prompt_is_a_string_or_a_list_of_messages(prompt: Any):
    with pytest.raises(BadRequest, match="prompt: "):
        parameters(prompt)


def test_a_prompt_with_a_lone_surrogate_is_refused():
    with pytest.raises(BadRequest, match=r"text_input: .* position 2"):
        parameters("ab\udcff")


@pytest.mark.parametrize("url", ["localhost", "http://localhost:8000", ":8001", "localhost:http", ""])
def test_a_url_is_host_and_port(url: str):
    with pytest.raises(BadRequest, match=r"url: .*localhost:8001"):
        TridentClient(url)


@pytest.mark.parametrize("url", ["localhost:8001", "127.0.0.1:1", "[::1]:8001"])
def test_hosts_may_be_names_and_addresses(url: str):
    assert check_url(url) == url


def test_admin_arguments_are_json():
    request = admin_request("llm_admin", "load", "", {"name": "a"})
    sent = {tensor.name: tensor.contents.bytes_contents[0] for tensor in request.inputs}
    assert sent == {"command": b"load", "arguments": b'{"name": "a"}'}
    assert all(list(tensor.shape) == [1] for tensor in request.inputs)


def test_the_admin_token_is_an_argument():
    request = admin_request("llm_admin", "stats", "secret", {})
    assert request.inputs[1].contents.bytes_contents[0] == b'{"admin_token": "secret"}'


def test_an_admin_result_that_is_no_object_is_an_error():
    with FakeTriton() as server, TridentClient(server.url) as client:
        server.results["stats"] = [1]
        with pytest.raises(EngineFailed, match="JSON object"):
            client.stats()


def test_samples_are_told_apart():
    with FakeTriton(samples=2) as server, TridentClient(server.url) as client:
        chunks = list(client.generate("Hi", n=2))
        whole = client.generate("Hi", stream=False, n=2)
    assert [(chunk.index, chunk.text) for chunk in chunks[:3]] == [(0, "Hello"), (1, "Hello"), (0, ", ")]
    assert Completion.from_chunks(chunks) == whole
    assert [sample.text for sample in whole.samples] == ["Hello, world"] * 2


def test_a_completion_joins_what_belongs_together():
    chunks = [
        Chunk(text="a", num_input_tokens=3, num_output_tokens=1, cumulative_logprob=-1.0, logprobs=[{"5": {}}]),
        Chunk(
            text="", num_input_tokens=3, num_output_tokens=2, cumulative_logprob=-3.0, logprobs=[{"6": {}}, {"7": {}}]
        ),
        Chunk(text="b", num_input_tokens=3, num_output_tokens=1, cumulative_logprob=-3.5, finish_reason="length"),
    ]
    whole = Completion.from_chunks(chunks)
    assert (whole.text, whole.finish_reason, whole.num_input_tokens, whole.num_output_tokens) == ("ab", "length", 3, 4)
    assert whole.samples[0].cumulative_logprob == -3.5
    assert whole.samples[0].logprobs == [{"5": {}}, {"6": {}}, {"7": {}}]


@pytest.mark.parametrize(
    ("texts", "counts", "logprobs"),
    [(["ü€😀"], [2**32 - 1], -0.5), (["a\0b", "", "x" * 70_000], [1, 2, 0], -1e30)],
)
def test_contents_are_read_as_tritonclient_reads_them(texts: list[str], counts: list[int], logprobs: float):
    response = service_pb2.ModelInferResponse(model_name="llm")
    for name, values, kind in (
        ("text_output", texts, object),
        ("an output that is not known", ["x"], object),
        ("finish_reason", ["length", "None", ""][: len(texts)], object),
        ("logprobs", ['[{"1": {"logprob": -0.5}}]', "null", "[]"][: len(texts)], object),
        ("num_input_tokens", [11], np.uint32),
        ("num_output_tokens", counts, np.uint32),
        ("cumulative_logprob", [logprobs] * len(texts), np.float32),
    ):
        array = np.array(values, kind)
        response.outputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        raw = serialize_byte_tensor(array).item() if kind is object else array.tobytes()
        response.raw_output_contents.append(raw)
    theirs = InferResult(response)
    chunks = AnswerDecoder().decode(service_pb2.ModelStreamInferResponse(infer_response=response))
    assert [chunk.index for chunk in chunks] == list(range(len(texts)))
    for index, chunk in enumerate(chunks):
        assert chunk.text.encode() == theirs.as_numpy("text_output")[index]
        assert chunk.num_output_tokens == theirs.as_numpy("num_output_tokens")[index]
        assert chunk.cumulative_logprob == theirs.as_numpy("cumulative_logprob")[index]
        assert chunk.num_input_tokens == theirs.as_numpy("num_input_tokens")[0] == 11
        assert chunk.logprobs == json.loads(theirs.as_numpy("logprobs")[index])
        assert chunk.finish_reason == ("length" if index == 0 else None)


def test_text_that_is_no_utf8_is_replaced():
    response = service_pb2.ModelInferResponse(model_name="llm")
    response.outputs.add(name="text_output", datatype="BYTES", shape=[1])
    response.raw_output_contents.append(struct.pack("<I", 2) + b"a\xff")
    (chunk,) = AnswerDecoder().decode(service_pb2.ModelStreamInferResponse(infer_response=response))
    assert chunk.text == "a\N{REPLACEMENT CHARACTER}" and chunk.num_output_tokens is None


def test_an_answer_without_any_text_is_one_empty_sample():
    whole = Completion.from_chunks([])
    assert (whole.text, whole.finish_reason, whole.num_output_tokens) == ("", None, None)


def test_an_unknown_model_is_not_found_although_streams_carry_no_status():
    with (
        FakeTriton() as server,
        TridentClient(server.url, model="nope") as client,
        pytest.raises(NotFound, match="nope"),
    ):
        client.generate("Hi", stream=False)


def test_an_error_text_may_stand_inside_another():
    text = "in model 'llm', message: [INVALID_ARG] max_tokens: 0 is not allowed"
    with FakeTriton(Fail(text)) as server, TridentClient(server.url) as client, pytest.raises(BadRequest) as caught:
        client.generate("Hi", stream=False)
    assert str(caught.value) == "[INVALID_ARG] max_tokens: 0 is not allowed"


def test_a_stream_that_failed_is_read_to_its_end():
    with FakeTriton(Fail("[INVALID_ARG] no")) as server:
        with TridentClient(server.url) as client, pytest.raises(BadRequest):
            client.generate("Hi", stream=False)
        assert server.generations[0].served.wait(1.0)

        async def ask() -> None:
            async with AsyncTridentClient(server.url) as client:
                with pytest.raises(BadRequest):
                    await client.generate("Hi", stream=False)

        asyncio.run(ask())
        assert server.generations[1].served.wait(1.0)


def test_a_stream_that_does_not_end_after_an_error_is_cancelled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trident_client.client.ERROR_END_SECONDS", 0.05)
    monkeypatch.setattr("trident_client.aio.ERROR_END_SECONDS", 0.05)
    with FakeTriton(Fail("[INVALID_ARG] no")) as server:
        with TridentClient(server.url) as client, pytest.raises(BadRequest):
            client.generate("Hi", stream=False)

        async def ask() -> None:
            async with AsyncTridentClient(server.url) as client:
                with pytest.raises(BadRequest):
                    await client.generate("Hi", stream=False)

        asyncio.run(ask())
        assert all(generation.cancelled.wait(1.0) for generation in server.generations)
