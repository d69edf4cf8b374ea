"""The gateway before two servers: where requests go as servers fill up, fail, come back, and gain adapters."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.fakes.fake_triton import Answer, Break, Fail, FakeTriton, Hang
from tests.gateway.gateways import client, gateway
from trident_gateway import upstreams as upstreams_module
from trident_gateway.affinity import FEW_REQUESTS, key_of, ranked
from trident_gateway.places import Place, look_up, read_places
from trident_gateway.upstreams import Upstreams

FULL = Fail("[UNAVAILABLE] the queue is full; retry after 1 s")
DEADLY = Fail("[INTERNAL] the engine broke 3 times while it served this request, the last time nothing else")
TEXT = "Hello, world"


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[FakeTriton, FakeTriton, openai.OpenAI]]:
    """Two servers and a client of the gateway before them."""
    with FakeTriton() as one, FakeTriton() as two, gateway(f"{one.url},{two.url}") as address:
        yield one, two, client(address)


@pytest.fixture
def servers(pair: tuple[FakeTriton, FakeTriton, openai.OpenAI]) -> tuple[FakeTriton, FakeTriton, openai.OpenAI]:
    """The same, which answer again and have been asked nothing."""
    for server in pair[:2]:
        server.script[:] = [Answer()]
        server.generations.clear()
    return pair


def ask(api: openai.OpenAI, prompt: str, **options: Any) -> str:
    return api.completions.create(model="llm", prompt=prompt, **options).choices[0].text


def prompt_for(server: FakeTriton, other: FakeTriton, start: str = "prompt") -> str:
    """A prompt whose own server is ``server``."""
    urls = [server.url, other.url]
    prompts = (f"{start} {number}" for number in range(1000))
    return next(prompt for prompt in prompts if ranked(urls, key_of("llm", "", prompt))[0] == server.url)


def texts(server: FakeTriton) -> list[str]:
    return [generation.text_input for generation in server.generations]


def wait_until(condition: Callable[[], object], seconds: float = 8.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_conversations_stay_at_their_server(servers: tuple[FakeTriton, FakeTriton, openai.OpenAI]) -> None:
    one, two, api = servers
    for number in range(12):
        for _ in range(2):
            ask(api, f"prompt {number}")
    for server, other in ((one, two), (two, one)):
        assert texts(server) and not set(texts(server)) & set(texts(other))
        assert all(ranked([one.url, two.url], key_of("llm", "", text))[0] == server.url for text in texts(server))
    prompts = [prompt_for(one, two), prompt_for(two, one)]
    api.completions.create(model="llm", prompt=prompts)
    assert (texts(one)[-1], texts(two)[-1]) == tuple(prompts), "each prompt of a list has a server of its own"


@pytest.mark.parametrize("failure", [FULL, Break(()), Fail("Server is stopping, no new requests")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_without_a_token_goes_on_to_the_next(
    servers: tuple[FakeTriton, FakeTriton, openai.OpenAI], failure: Any, stream: bool
) -> None:
    one, two, api = servers
    prompt = prompt_for(one, two)
    one.script[:] = [failure]
    answer: Any = api.completions.create(model="llm", prompt=prompt, stream=stream)
    assert (answer.choices[0].text if not stream else "".join(part.choices[0].text for part in answer)) == TEXT
    assert texts(one) == texts(two) == [prompt]


def test_what_breaks_servers_does_not_go_through_all(servers: tuple[FakeTriton, FakeTriton, openai.OpenAI]) -> None:
    one, two, api = servers
    one.script[:] = [DEADLY]
    with pytest.raises(openai.InternalServerError, match="broke 3 times"):
        ask(api, prompt_for(one, two))
    assert texts(two) == []
    with FakeTriton(Break(())) as third, FakeTriton(Break(())) as fourth, FakeTriton(Break(())) as fifth:
        with gateway(third.url, fourth.url, fifth.url) as address, pytest.raises(openai.InternalServerError):
            ask(client(address), "x")
        assert len(texts(third) + texts(fourth) + texts(fifth)) == 2


def test_nothing_is_asked_again_after_a_token(servers: tuple[FakeTriton, FakeTriton, openai.OpenAI]) -> None:
    one, two, api = servers
    one.script[:] = [Fail(FULL.text, tokens=("Hel",))]
    with pytest.raises(openai.APIError, match="queue is full"):
        list(api.completions.create(model="llm", prompt=prompt_for(one, two), stream=True))
    assert texts(two) == []


def test_when_all_are_full_the_client_is_told_to_wait(servers: tuple[FakeTriton, FakeTriton, openai.OpenAI]) -> None:
    one, two, api = servers
    one.script[:] = two.script[:] = [FULL]
    with pytest.raises(openai.RateLimitError) as caught:
        ask(api, "x")
    assert caught.value.response.headers["retry-after"] == "1" and len(texts(one) + texts(two)) == 2


def test_a_server_with_more_than_its_share_is_passed_over(
    servers: tuple[FakeTriton, FakeTriton, openai.OpenAI],
) -> None:
    one, two, api = servers
    one.script[:] = [Hang(("a",))]
    prompt = prompt_for(one, two)
    with contextlib.ExitStack() as stack:
        for _ in range(FEW_REQUESTS):
            stream = stack.enter_context(api.completions.create(model="llm", prompt=prompt, stream=True))
            assert next(stream).choices[0].text == "a"
        assert ask(api, prompt) == TEXT and texts(two) == [prompt]
    wait_until(lambda: all(generation.cancelled.is_set() for generation in one.generations))
    one.script[:] = [Answer()]
    wait_until(lambda: ask(api, prompt) == TEXT and len(texts(one)) > FEW_REQUESTS)


def test_a_server_that_dies_is_passed_over_and_has_its_own_again_later() -> None:
    with FakeTriton() as two, contextlib.ExitStack() as first_life:
        one = first_life.enter_context(FakeTriton())
        with gateway(one.url, two.url) as address:
            api, prompt = client(address), prompt_for(one, two)
            ask(api, prompt)
            first_life.close()
            assert [ask(api, prompt) for _ in range(3)] == [TEXT] * 3
            assert texts(one) == [prompt] and texts(two) == [prompt] * 3
            with FakeTriton(address=one.url) as again:
                wait_until(lambda: ask(api, prompt) == TEXT and texts(again))
                again.results["health"] = {"ready": False}
                wait_until(lambda: ask(api, prompt) == TEXT and len(texts(two)) > 3)


def test_an_adapter_is_asked_for_where_it_is_loaded() -> None:
    with FakeTriton() as one, FakeTriton() as two:
        one.results["list_adapters"] = {"adapters": [], "mixes": []}
        two.results["list_adapters"] = {"adapters": [{"name": "poet"}], "mixes": [{"name": "blend"}]}
        with gateway(one.url, two.url) as address:
            api = client(address)
            assert [model.id for model in api.models.list()] == ["llm", "blend", "poet"]
            for number in range(8):
                api.completions.create(model="poet", prompt=f"prompt {number}")
            assert texts(one) == [] and {generation.parameters["adapter"] for generation in two.generations} == {"poet"}
            two.script[:] = [Fail("[NOT_FOUND] adapter: 'poet' is not loaded; loaded: none")]
            with pytest.raises(openai.NotFoundError, match="is not loaded"):
                api.completions.create(model="poet", prompt="x")


def test_addresses_of_a_name_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ["127.0.0.1"]

    async def names(place: Place) -> list[str]:
        if not hosts:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [f"{host}:{one.port}" for host in hosts]

    monkeypatch.setattr(upstreams_module, "_LOOK_UP_SECONDS", 0.05)
    with (
        FakeTriton() as one,
        FakeTriton(address=f"127.0.0.2:{one.port}") as two,
        gateway(f"dns:servers.test:{one.port}", look_up=names) as address,
    ):
        api, prompt = client(address), prompt_for(two, one)
        ask(api, prompt)
        assert texts(one) == [prompt]
        hosts.append("127.0.0.2")
        wait_until(lambda: ask(api, prompt) == TEXT and texts(two))
        hosts.clear()  # no answer: what is known stays
        time.sleep(0.2)
        assert ask(api, prompt) == TEXT
        two.script[:] = [Answer(delay=0.3)]
        stream = api.completions.create(model="llm", prompt=prompt, stream=True)
        begun, before = next(stream).choices[0].text, len(texts(one))
        hosts.append("127.0.0.1")
        wait_until(lambda: ask(api, prompt) == TEXT and len(texts(one)) > before)
        assert begun + "".join(part.choices[0].text for part in stream) == TEXT, "what runs there is not cut off"


def test_no_address_at_all_is_unavailable() -> None:
    with gateway("dns:no-such-host.invalid:8001") as address, pytest.raises(openai.InternalServerError) as caught:
        ask(client(address), "x")
    assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "2"


def test_a_name_and_an_address_of_it_are_one_server() -> None:
    async def check() -> None:
        async def names(place: Place) -> list[str]:
            assert place == Place("servers.test:1", True)
            return ["10.1.1.1:1", "10.1.1.2:1"]

        servers = Upstreams(read_places(["dns:servers.test:1, 10.1.1.2:1"]), look_up=names)
        assert [upstream.url for upstream in servers.all] == ["10.1.1.2:1"]
        await servers.find()
        assert [upstream.url for upstream in servers.all] == ["10.1.1.1:1", "10.1.1.2:1"]
        await servers.close()

    asyncio.run(check())


def test_the_systems_resolver_is_asked() -> None:
    assert "127.0.0.1:8001" in asyncio.run(look_up(Place("localhost:8001", True)))
    for host in ("no-such-host.invalid", "x" * 100):
        with pytest.raises(OSError):
            asyncio.run(look_up(Place(f"{host}:8001", True)))
