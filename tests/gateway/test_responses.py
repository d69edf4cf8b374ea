"""Events on their way from gRPC to a client's socket: together when they wait together, never lost, never reordered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest

from trident_client import Chunk
from trident_gateway.answers import AnswerWriter
from trident_gateway.questions import read_question
from trident_gateway.responses import EventStream

Events = Callable[[], AsyncGenerator[bytes, None]]


async def run(stream: EventStream, send: Callable[[Any], Coroutine[Any, Any, None]], gone: asyncio.Event) -> None:
    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    await stream({"type": "http"}, receive, send)


def sent(first: bytes, events: Events, pause: float = 0.0) -> list[dict[str, Any]]:
    """The messages to the HTTP server, each of which takes ``pause`` seconds."""
    messages: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)
        await asyncio.sleep(pause)

    asyncio.run(run(EventStream(first, events()), send, asyncio.Event()))
    return messages


def bodies(messages: list[dict[str, Any]]) -> list[bytes]:
    assert messages[0]["type"] == "http.response.start" and messages[0]["status"] == 200
    assert [message["more_body"] for message in messages[1:]] == [True] * (len(messages) - 2) + [False]
    assert messages[-1]["body"] == b""
    return [message["body"] for message in messages[1:-1]]


def test_events_that_wait_are_sent_together() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        for number in range(10):
            yield b"%d " % number

    assert bodies(sent(b"first ", events)) == [b"first ", b"0 1 2 3 4 5 6 7 8 9 "]


def test_events_that_come_apart_are_sent_apart() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        for number in range(3):
            await asyncio.sleep(0.02)
            yield b"%d " % number
            yield b""

    assert bodies(sent(b"", events)) == [b"0 ", b"1 ", b"2 "]


def test_what_follows_at_the_next_turn_of_the_loop_goes_along() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        yield b"a"
        await asyncio.sleep(0)
        yield b"b"

    assert bodies(sent(b"first", events)) == [b"first", b"ab"]


def test_a_slow_client_slows_reading_and_gets_all() -> None:
    read = 0

    async def events() -> AsyncGenerator[bytes, None]:
        nonlocal read
        for number in range(200):
            read = number + 1
            yield b"%d" % (number % 10) * 2**12

    found: list[tuple[int, bytes]] = []

    async def send(message: dict[str, Any]) -> None:
        found.append((read, message.get("body", b"")))
        await asyncio.sleep(0.005)

    asyncio.run(run(EventStream(b"first", events()), send, asyncio.Event()))
    assert b"".join(body for _, body in found)[5:] == b"".join(b"%d" % (number % 10) * 2**12 for number in range(200))
    assert max(len(body) for _, body in found) <= 2**16 + 2**12
    assert found[1][0] <= 17, "before anything but the first is taken, 64 KiB wait and an event more"


def test_an_error_is_not_an_end() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        yield b"a"
        raise ValueError("broke")

    messages: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    with pytest.raises(ValueError, match="broke"):
        asyncio.run(run(EventStream(b"first", events()), send, asyncio.Event()))
    assert [message.get("body") for message in messages] == [None, b"first", b"a"] and messages[-1]["more_body"]


@pytest.mark.parametrize("slow", [False, True])
def test_a_client_that_leaves_closes_the_events(slow: bool) -> None:
    closed = False

    async def events() -> AsyncGenerator[bytes, None]:
        nonlocal closed
        try:
            while True:
                yield b"x" * 2**12
                await asyncio.sleep(0.001)
        finally:
            closed = True

    async def send(_: dict[str, Any]) -> None:
        if slow:
            await asyncio.sleep(100)

    async def check() -> None:
        gone = asyncio.Event()
        task = asyncio.create_task(run(EventStream(b"first", events()), send, gone))
        await asyncio.sleep(0.1)
        assert not closed
        gone.set()
        await asyncio.wait_for(task, 5)
        assert closed

    asyncio.run(check())


TEXTS = ["plain", 'quo"te', "back\\slash", "new\nline", "\0", "\x00\x1f\x7f", "ü€😀", "\u2028", "", "]}"]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("model", ["llm", '\0"\\u0000"', "ü"])
def test_events_are_whole_json_whatever_the_text(chat: bool, usage: bool, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "stream": True, "n": 2}
    asked |= {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": ["a", "b"]}
    if usage:
        asked["stream_options"] = {"include_usage": True}
    writer = AnswerWriter(read_question(json.dumps(asked).encode(), chat=chat))
    heads = set()
    for prompt in range(1 if chat else 2):
        for sample in range(2):
            for number, text in enumerate(TEXTS):
                event = writer.chunk(Chunk(text=text, index=sample, num_output_tokens=1), prompt)
                if not text:
                    assert event == b""
                    continue
                assert event.startswith(b"data: {") and event.endswith(b"}\n\n") and event.count(b"\n") == 2
                found = json.loads(event.removeprefix(b"data: "))
                (choice,) = found.pop("choices")
                assert ("usage" in found) == usage and found.pop("usage", None) is None
                heads.add(json.dumps(found))
                begun = {"role": "assistant"} if number == 0 else {}
                said = {"delta": {**begun, "content": text}} if chat else {"text": text}
                assert choice == {"index": prompt * 2 + sample, **said, "logprobs": None, "finish_reason": None}
    (head,) = heads
    kind = "chat.completion.chunk" if chat else "text_completion"
    assert json.loads(head)["model"] == model and json.loads(head)["object"] == kind
