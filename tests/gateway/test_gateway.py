"""The gateway before a server that does what a script says, mostly through the official client."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.fakes.fake_triton import Answer, Fail, FakeTriton, Hang
from tests.gateway.gateways import client, gateway
from trident_client import cli
from trident_gateway.answers import AnswerWriter
from trident_gateway.questions import read_question

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
BODY = {"model": "llm", "messages": MESSAGES}


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeTriton]:
    with FakeTriton() as server:
        server.results["list_adapters"] = {"adapters": [{"name": "poet"}], "mixes": [{"name": "blend"}]}
        yield server


@pytest.fixture(scope="module")
def address(fake: FakeTriton) -> Iterator[str]:
    with gateway(fake.url) as address:
        yield address


def post(address: str, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    data = body if isinstance(body, (bytes, str)) else json.dumps(body)
    connection.request("POST", path, data, {"content-type": "application/json", **headers})
    response = connection.getresponse()
    found = response.status, json.loads(response.read()), response.headers
    connection.close()
    return found


def test_options_reach_the_server(fake: FakeTriton, address: str) -> None:
    answer = client(address).chat.completions.create(
        model="poet", messages=MESSAGES, max_completion_tokens=5, temperature=0.5, top_p=0.9, seed=7, stop=["x"],
        presence_penalty=0.1, frequency_penalty=0.2, logit_bias={"5": 1}, user="me", extra_body={"top_k": 3},
    )  # fmt: skip
    assert answer.choices[0].message.content == "Hello, world" and answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 3)
    sent = fake.generations[-1].parameters
    assert json.loads(sent["messages"]) == MESSAGES  # type: ignore[arg-type]
    expected = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": '["x"]', "user": "me",
                "presence_penalty": 0.1, "frequency_penalty": 0.2, "logit_bias": '{"5": 1}', "top_k": 3,
                "adapter": "poet"}  # fmt: skip
    assert {name: sent.get(name) for name in expected} == expected and "xlora" not in sent


def test_streams_and_lists_of_prompts(fake: FakeTriton, address: str) -> None:
    with client(address).chat.completions.create(
        model="llm", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert [chunk.choices[0].delta.content for chunk in chunks[:-1]] == ["Hello", ", ", "world"]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 7 and not chunks[-1].choices
    assert fake.generations[-1].parameters["xlora"] is False
    both = client(address).completions.create(model="llm", prompt=["a", "b"])
    assert [(choice.index, choice.text) for choice in both.choices] == [(0, "Hello, world"), (1, "Hello, world")]
    assert both.usage is not None and both.usage.completion_tokens == 6
    assert {generation.text_input for generation in fake.generations[-2:]} == {"a", "b"}
    assert fake.generations[-1].parameters["max_tokens"] == 16


def test_models(address: str) -> None:
    assert [model.id for model in client(address).models.list()] == ["llm", "blend", "poet"]
    assert client(address).models.retrieve("poet").id == "poet"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client(address).models.retrieve("nobody")
    with pytest.raises(openai.NotFoundError) as caught:
        client(address).chat.completions.create(model="nobody", messages=MESSAGES)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"nonsense": 1}, "nonsense"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"model": 7}, "model"),
        ({"n": "2"}, "n"),
    ],
)
def test_bad_requests_name_the_field(address: str, changes: dict[str, Any], param: str) -> None:
    status, answer, _ = post(address, {**BODY, **changes})
    assert status == 400 and answer["error"]["param"] == param, answer
    assert answer["error"]["message"].startswith(f"{param}: ") and answer["error"]["type"] == "invalid_request_error"


def test_other_wrong_requests(address: str) -> None:
    assert post(address, b"{")[0] == 400
    status, answer, _ = post(address, {"model": "llm", "prompt": [1, 2]}, "/v1/completions")
    assert status == 400 and "token ids" in answer["error"]["message"]
    assert post(address, BODY, "/v1/nowhere")[:2][0] == 404
    assert post(address, {**BODY, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "status", "wait"),
    [
        ("[INVALID_ARG] max_tokens: 0 is not allowed; give more", 400, None),
        ("[UNAVAILABLE] the queue is full (max_queue_size 1); retry after 2 s", 429, "2"),
        ("[UNAVAILABLE] the engine is being started; retry after 3 s", 503, "3"),
        ("[INTERNAL] broke", 500, None),
    ],
)
def test_errors_of_the_server_have_a_status(text: str, status: int, wait: str | None, stream: bool) -> None:
    with FakeTriton(Fail(text)) as server, gateway(server.url) as address:
        found, answer, headers = post(address, {**BODY, "max_completion_tokens": 3, "stream": stream})
    assert found == status and headers["retry-after"] == wait, answer
    if status == 400:
        assert answer["error"]["param"] == "max_completion_tokens"


def test_an_error_within_a_stream_is_an_event() -> None:
    with FakeTriton(Fail("[INTERNAL] broke", tokens=("a",))) as server, gateway(server.url) as address:
        stream = client(address).chat.completions.create(model="llm", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="broke"):
            list(stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_sample_that_the_engine_gave_up_is_no_answer(stream: bool) -> None:
    with FakeTriton(Answer(("a",), finish_reason="error")) as server, gateway(server.url) as address:
        status, answer, _ = post(address, {**BODY, "stream": stream})
    assert status == 500 and answer["error"]["type"] == "server_error", answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels(stream: bool) -> None:
    with FakeTriton(Hang(("a",))) as server, gateway(server.url) as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
        connection.request("POST", "/v1/chat/completions", json.dumps({**BODY, "stream": stream}))
        if stream:
            connection.getresponse().readline()
        else:
            with pytest.raises(TimeoutError):
                assert connection.sock is not None
                connection.sock.settimeout(0.3)
                connection.getresponse()
        connection.close()
        if connection.sock is not None:
            connection.sock.close()
        assert server.generations[0].cancelled.wait(5)


def test_the_key_and_readiness() -> None:
    with gateway("127.0.0.1:1", api_key="secret") as address:
        with pytest.raises(openai.AuthenticationError):
            client(address, "wrong").models.list()
        assert [model.id for model in client(address, "secret").models.list()] == ["llm"]
        assert post(address, BODY)[0] == 401
        status, answer, headers = post(address, BODY, authorization="Bearer secret")
        assert status == 503 and headers["retry-after"] and answer["error"]["code"] == "unavailable"
        for path, expected in (("/health", 200), ("/ready", 503)):
            connection = http.client.HTTPConnection(address.removeprefix("http://"))
            connection.request("GET", path)
            assert connection.getresponse().status == expected
            connection.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--port", "0"], "--port"),
        (["--url", "nowhere"], "'nowhere'"),
        (["--url", "a:1,,b:2"], "''"),
        (["--url", "dns:nowhere"], "'dns:nowhere'"),
        (["--load-factor", "0.9"], "--load-factor: 0.9"),
        (["--load-factor", "nan"], "--load-factor: nan"),
        (["--drain-timeout", "-1"], "--drain-timeout: -1"),
    ],
)
def test_the_command_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main(["openai", *arguments]) == cli.EXIT_BAD_REQUEST
    assert message in capsys.readouterr().err


def test_text_offsets_go_on_over_chunks() -> None:
    from trident_client import Chunk

    body = {"model": "llm", "prompt": "a", "logprobs": 1, "stream": True}
    writer = AnswerWriter(read_question(json.dumps(body).encode(), chat=False))
    row = [{"5": {"logprob": -1.0, "rank": 2, "decoded_token": "ab"}, "6": {"logprob": -0.5, "rank": 1,
            "decoded_token": "c"}}]  # fmt: skip
    events = [writer.chunk(Chunk(text="ab", logprobs=row, num_output_tokens=1)) for _ in range(2)]
    found = [json.loads(event.removeprefix(b"data: "))["choices"][0]["logprobs"] for event in events]
    assert [part["text_offset"] for part in found] == [[0], [2]]
    assert found[0]["tokens"] == ["ab"] and found[0]["top_logprobs"] == [{"c": -0.5}]
