"""AsyncTridentClient against a server that does what a script says."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from functools import wraps
from typing import Any

import pytest

from tests.fakes.fake_triton import Answer, Break, Fail, FakeTriton, Generation, Hang, Refuse
from trident_client import (
    AsyncTridentClient,
    BadRequest,
    Cancelled,
    EngineFailed,
    Overloaded,
    RetryPolicy,
    TimedOut,
    TridentClient,
)
from trident_client.deadline import Deadline

QUICK = RetryPolicy(retries=3, first_delay=0.01, max_delay=1.0)


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def was_cancelled(generation: Generation) -> bool:
    return await asyncio.to_thread(generation.cancelled.wait, 1)


@in_a_loop
async def test_both_clients_get_the_same():
    with FakeTriton() as server, TridentClient(server.url) as sync:
        async with AsyncTridentClient(server.url) as client:
            chunks = [chunk async for chunk in client.generate("Hi", max_tokens=3)]
            whole = await client.generate("Hi", stream=False)
            assert await client.stats() == sync.stats()
            assert await client.health() == sync.health()
            assert await client.is_ready()
        assert chunks == list(sync.generate("Hi"))
        assert whole == sync.generate("Hi", stream=False)
        assert server.generations[0].parameters["max_tokens"] == 3


@in_a_loop
async def test_many_streams_share_one_client():
    async def read(prompt: str) -> str:
        return "".join([chunk.text async for chunk in client.generate(prompt)])

    with FakeTriton(Answer(tuple("abcdef"), delay=0.02)) as server:
        async with AsyncTridentClient(server.url) as client:
            assert await asyncio.gather(*(read(str(i)) for i in range(32))) == ["abcdef"] * 32
        assert {generation.text_input for generation in server.generations} == {str(i) for i in range(32)}


@pytest.mark.parametrize("leave", ["aclose", "break", "exception", "task"])
@in_a_loop
async def test_leaving_a_stream_cancels_it(leave: str):
    async def read() -> None:
        async for _ in client.generate("Hi"):
            pass

    with FakeTriton(Hang(("a",))) as server:
        async with AsyncTridentClient(server.url) as client:
            if leave == "aclose":
                chunks = client.generate("Hi")
                await anext(chunks)
                await chunks.aclose()
            elif leave == "break":
                async for _ in client.generate("Hi"):
                    break
            elif leave == "exception":
                with pytest.raises(RuntimeError):
                    async with aclosing(client.generate("Hi")) as chunks:
                        await anext(chunks)
                        raise RuntimeError
            else:
                task = asyncio.create_task(read())
                while not server.generations:
                    await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await was_cancelled(server.generations[0])


@in_a_loop
async def test_closing_the_client_ends_its_streams():
    with FakeTriton(Hang(("a",))) as server:
        client = AsyncTridentClient(server.url)
        chunks = client.generate("Hi")
        await anext(chunks)
        await client.close()
        with pytest.raises(Cancelled):
            await anext(chunks)
        assert await was_cancelled(server.generations[0])


@pytest.mark.parametrize("refusal", [Fail("[UNAVAILABLE] the queue is full"), Refuse()])
@in_a_loop
async def test_unavailable_is_retried(refusal: Fail | Refuse):
    with FakeTriton(refusal, refusal, Answer(("ok",))) as server:
        async with AsyncTridentClient(server.url, retry=QUICK) as client:
            assert (await client.generate("Hi", stream=False)).text == "ok"
        assert len(server.generations) == 3


@in_a_loop
async def test_retries_are_bounded_and_end_with_the_first_token():
    with FakeTriton(Fail("[UNAVAILABLE] full", tokens=("a",)), Fail("[UNAVAILABLE] full")) as server:
        async with AsyncTridentClient(server.url, retry=QUICK) as client:
            with pytest.raises(Overloaded):
                async for _ in client.generate("Hi"):
                    pass
            assert len(server.generations) == 1
            with pytest.raises(Overloaded):
                await client.generate("Hi", stream=False)
        assert len(server.generations) == 2 + QUICK.retries


@in_a_loop
async def test_errors_keep_their_kind():
    with FakeTriton(Fail("[INVALID_ARG] top_p: 7"), Break()) as server:
        async with AsyncTridentClient(server.url) as client:
            with pytest.raises(BadRequest, match="top_p: 7"):
                await client.generate("Hi", stream=False)
            with pytest.raises(EngineFailed, match="ended before"):
                await client.generate("Hi", stream=False)
            with pytest.raises(BadRequest, match="command: 'load'"):
                await client.admin("load")
            with pytest.raises(BadRequest, match="timeout"):
                client.generate("Hi", timeout=0)


@in_a_loop
async def test_no_server_is_unavailable():
    async with AsyncTridentClient("127.0.0.1:1", retry=RetryPolicy(retries=0)) as client:
        with pytest.raises(Overloaded, match="no connection"):
            await client.generate("Hi", stream=False)
        assert not await client.is_ready()


@in_a_loop
async def test_a_server_that_took_all_the_time_is_not_ready(monkeypatch: pytest.MonkeyPatch):
    left = iter([5.0, 0.0])
    monkeypatch.setattr(Deadline, "remaining", lambda self: next(left))
    with FakeTriton() as server:
        async with AsyncTridentClient(server.url) as client:
            assert not await client.is_ready()


@in_a_loop
async def test_readiness_asks_the_engine_where_it_can():
    with FakeTriton() as server:
        async with AsyncTridentClient(server.url) as client:
            server.results["health"] = {"ready": False}
            assert not await client.is_ready()
            server.results.pop("health")  # refused, as without the admin token
            assert await client.is_ready()
            server.has_admin = False
            assert await client.is_ready()
        async with AsyncTridentClient(server.url, model="nope") as other:
            assert not await other.is_ready()


@in_a_loop
async def test_a_timeout_ends_the_request_on_both_sides():
    with FakeTriton(Hang(("a",))) as server:
        async with AsyncTridentClient(server.url) as client:
            start = time.monotonic()
            with pytest.raises(TimedOut):
                await client.generate("Hi", stream=False, timeout=0.3)
            assert time.monotonic() - start < 2
        assert await was_cancelled(server.generations[0])
