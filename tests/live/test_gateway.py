"""The official OpenAI client through the gateway, against a real Triton server with the fake engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from served_gateway import ServedGateway
from served_model import environment_of_checkout

from tests.fakes.fake_engine import expected_text
from tests.gateway.gateways import client, gateway
from tests.live.live_server import LiveServer

pytestmark = pytest.mark.live
MESSAGES: Any = [{"role": "user", "content": "Hello"}]
TEMPLATED = "user:Hello\nassistant:"


@pytest.fixture(scope="module")
def api(fake_server: LiveServer) -> Iterator[openai.OpenAI]:
    with gateway(fake_server.grpc_url, admin_token="secret", api_key="key") as address:
        yield client(address, "key")


def test_chat_and_completions(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="llm", messages=MESSAGES, max_completion_tokens=9, seed=1)
    assert answer.choices[0].message.content == expected_text(TEMPLATED, 9)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(TEMPLATED), 9)
    again = api.chat.completions.create(model="llm", messages=MESSAGES, max_completion_tokens=9, seed=1)
    assert again.choices == answer.choices
    assert api.completions.create(model="llm", prompt="Hi", max_tokens=6).choices[0].text == expected_text("Hi", 6)


def test_samples_in_a_stream_with_usage(api: openai.OpenAI) -> None:
    texts, usage = {0: "", 1: ""}, None
    for chunk in api.chat.completions.create(
        model="llm", messages=MESSAGES, max_tokens=9, n=2, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {index: expected_text(TEMPLATED, 9, index) for index in (0, 1)}
    assert usage is not None and usage.completion_tokens == 18


def test_stop_and_logprobs(api: openai.OpenAI) -> None:
    whole = expected_text(TEMPLATED, 12)
    stopped = api.chat.completions.create(model="llm", messages=MESSAGES, max_tokens=12, stop=whole[4:6])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == (whole[:4], "stop")
    scored = api.chat.completions.create(model="llm", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2)
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == scored.choices[0].message.content
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2, 2, 2]
    assert logprobs.content[0].logprob == pytest.approx(-0.5)
    plain = api.completions.create(model="llm", prompt="Hi", max_tokens=3, logprobs=2).choices[0].logprobs
    assert plain is not None and plain.text_offset == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "param"), [({"top_p": 7}, "top_p"), ({"max_completion_tokens": 0}, "max_completion_tokens")]
)
def test_bad_values_are_named(api: openai.OpenAI, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="llm", messages=MESSAGES, **changes)
    assert caught.value.param == param


def test_unknown_models_and_keys(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["llm"]
    with pytest.raises(openai.NotFoundError):
        api.completions.create(model="nobody", prompt="Hi")
    with pytest.raises(openai.AuthenticationError):
        api.with_options(api_key="other").models.list()


class Load:
    """Clients that ask one question after another, each over a new connection, which any worker may get."""

    def __init__(self, address: str, num_clients: int) -> None:
        self._address = f"http://{address}"
        self._end = threading.Event()
        self.answered: list[float] = []
        """When the requests that were answered began."""
        self.failed: list[float] = []
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(num_clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, number: int) -> None:
        while not self._end.is_set():
            began = time.monotonic()
            try:
                with client(self._address, "key") as api:
                    stream = api.completions.create(model="llm", prompt=f"Hi {number}", max_tokens=8, stream=True)
                    text = "".join(chunk.choices[0].text for chunk in stream)
                assert text == expected_text(f"Hi {number}", 8)
            except (openai.APIError, OSError, AssertionError):
                self.failed.append(began)
            else:
                self.answered.append(began)


def test_a_worker_that_is_killed_under_load_costs_only_what_it_carried(fake_server: LiveServer) -> None:
    arguments = ["--workers", "2", "--admin-token", "secret", "--api-key", "key"]
    with ServedGateway(fake_server.grpc_url, environment_of_checkout(), arguments) as gateway:
        with Load(gateway.address, 8) as load:
            wait_until(lambda: len(load.answered) > 32)
            (killed, other) = gateway.workers()
            killed.kill()
            at = time.monotonic()
            wait_until(lambda: {worker.pid for worker in gateway.workers()} - {killed.pid, other.pid})
            wait_until(lambda: sum(began > at for began in load.answered) > 64)
        processes = gateway.processes()
        assert len(gateway.workers()) == 2 and other in gateway.workers()
        assert len(load.failed) <= 8 and all(began < at for began in load.failed), "no new request fails"
    wait_until(lambda: not any(process.is_running() for process in processes))


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
