"""Requests that must be refused, on every way into a real server; whoever asks properly next is answered."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from tests.fakes.fake_engine import expected_text
from tests.live.bad_inputs import BAD, MAX_PROMPT_BYTES, Bad
from tests.live.live_server import LiveServer
from tests.live.requests import GrpcStream, HttpAnswer, generate, post, seconds_until_free, text_of

pytestmark = pytest.mark.live
DOORS = ("llm", "llm_vllm")


@pytest.fixture(scope="module", params=DOORS)
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def stream(fake_server: LiveServer, door: str) -> Iterator[GrpcStream]:
    with GrpcStream(fake_server, door) as stream:
        yield stream


def check_answers(server: LiveServer, door: str) -> None:
    answer = generate(server, door, "hello", max_tokens=2, exclude_input_in_output=True)
    assert answer.body["text_output"] == expected_text("hello", 2)


@pytest.mark.parametrize("case", BAD)
def test_it_is_refused_by_name(fake_server: LiveServer, door: str, stream: GrpcStream, case: str) -> None:
    bad = BAD[case]
    expected = f"[INVALID_ARG] {bad.error}"
    for endpoint, streams in (("generate", False), ("generate_stream", True)):
        options = {"stream": streams, **bad.options}
        answer = post_bytes(fake_server, f"/v2/models/{door}/{endpoint}", body_of(bad, options))
        assert answer.status == 400 and answer.body["error"].startswith(expected)
        stream.submit(bad.prompt, **options)
        refused = stream.next()
        assert refused.is_final and refused.error.startswith(expected)
    stream.submit("hello", max_tokens=2, stream=True)
    assert text_of(stream.until_final()) == expected_text("hello", 2)


def body_of(bad: Bad, options: dict[str, object]) -> bytes:
    """JSON, whose prompt may be no text."""
    if isinstance(bad.prompt, str):
        return json.dumps({"text_input": bad.prompt, **options}).encode()
    return json.dumps({"text_input": "PROMPT", **options}).encode().replace(b"PROMPT", bad.prompt)


def post_bytes(server: LiveServer, path: str, body: bytes, content_type: str = "application/json") -> HttpAnswer:
    """The answer to a request that is refused."""
    request = urllib.request.Request(server.http_url + path, body, {"Content-Type": content_type})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    return HttpAnswer(caught.value.code, json.loads(caught.value.read().removeprefix(b"data: ")))


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    ("body", "statuses", "words"),
    [
        (b"{no", (400, 500), ("JSON",)),
        (b"", (400, 500), ("JSON",)),
        (b'{"prompt": "hello"}', (400,), ("text_input",)),
        (b'{"text_input": 5}', (400, 500), ("JSON", "string")),
        (b'{"text_input": "hello", "stop": ["a"]}', (400,), ("'stop'", "'int', 'bool', or 'string'")),
        (b'{"text_input": "hello", "seed": null}', (400,), ("'seed'", "'int', 'bool', or 'string'")),
        (b'{"text_input": "hello", "stream": "maybe"}', (400, 500), ("",)),
    ],
)
def test_http_that_the_server_itself_cannot_take(
    fake_server: LiveServer, door: str, endpoint: str, body: bytes, statuses: tuple[int, ...], words: tuple[str, ...]
) -> None:
    """The statuses are the Triton server's, which differ between its versions."""
    answer = post_bytes(fake_server, f"/v2/models/{door}/{endpoint}", body)
    assert answer.status in statuses and all(word in answer.body["error"] for word in words)
    check_answers(fake_server, door)


def test_a_large_form_does_not_end_the_server(fake_server: LiveServer, door: str) -> None:
    """JSON under the content type that curl gives it, as long as the longest prompt can be with every byte escaped."""
    body = b'{"text_input": "%s"}' % (b"\\u0041" * MAX_PROMPT_BYTES)
    answer = post_bytes(fake_server, f"/v2/models/{door}/generate", body, "application/x-www-form-urlencoded")
    assert answer.status == 400
    assert answer.body["error"].startswith(f"[INVALID_ARG] text_input: {MAX_PROMPT_BYTES} tokens; at most 4095")
    check_answers(fake_server, door)


def test_unknown_models_and_versions(fake_server: LiveServer) -> None:
    for path in ("nobody", "llm_vllm/versions/7"):
        answer = post_bytes(fake_server, f"/v2/models/{path}/generate", b'{"text_input": "hello"}')
        assert answer.status in (400, 404) and "is not found" in answer.body["error"]


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, ("'text_input'", "Expected [-1,1], got [1]")), ({"stream": True}, ("1 inputs but got 2", "'stream'"))],
)
def test_wrong_tensors_of_llm(fake_server: LiveServer, options: dict[str, bool], words: tuple[str, ...]) -> None:
    """A prompt without its batch dimension, and an option where only the prompt is an input."""
    with GrpcStream(fake_server, "llm", batched=False) as stream:
        stream.submit("hello", **options)
        refused = stream.next()
    assert all(word in refused.error for word in words), refused.error
    check_answers(fake_server, "llm")


ADMIN = {
    "unknown command": ("reboot", {}, "command: 'reboot' is not allowed; give one of config, health, stats, load_ad"),
    "unknown argument": ("health", {"depth": 1}, "arguments: 'depth' is not an argument of 'health', which has none"),
    "other argument": (
        "unload_adapter", {"path": "a"}, "arguments: 'path' is not an argument of 'unload_adapter'; allowed: name",
    ),
    "missing argument": ("load_adapter", {"name": "a"}, "arguments: 'load_adapter' needs 'path'"),
    "type": ("load_adapter", {"name": "a", "path": 5}, "path: 5 is not allowed; give a string"),
    "name": ("load_adapter", {"name": "../a", "path": "a"}, "name: '../a' is no name of an adapter; give 1 to 200"),
    "settings": ("requantize", {"settings": "rtn"}, "settings: 'rtn' is not allowed; give a JSON object"),
    "flag": ("load_adapter", {"name": "a", "path": "a", "pinned": 1}, "pinned: 1 is not allowed; give true or false"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADMIN)
def test_commands_are_refused_by_name(fake_server: LiveServer, case: str) -> None:
    command, arguments, error = ADMIN[case]
    texts = {"command": command, "arguments": json.dumps({"admin_token": "secret", **arguments})}
    answer = post(fake_server, "/v2/models/llm_admin/generate", **texts)
    assert answer.status == 400 and answer.body["error"].startswith(f"[INVALID_ARG] {error}")
    inputs = [grpcclient.InferInput(name, [1], "BYTES") for name in texts]
    for tensor, text in zip(inputs, texts.values(), strict=True):
        tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    with fake_server.grpc_client() as client, pytest.raises(InferenceServerException) as caught:
        client.infer("llm_admin", inputs)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert caught.value.message().startswith(f"[INVALID_ARG] {error}")


def test_nothing_is_held_for_them(fake_server: LiveServer) -> None:
    assert seconds_until_free(fake_server, 5.0) < 1.0
