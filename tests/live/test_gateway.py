"""The official OpenAI client through the gateway, against a real Triton server with the fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

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
