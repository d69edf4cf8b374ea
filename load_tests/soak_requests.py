"""Random requests of a soak: what each kind asks, how often it comes, and what counts as a good answer."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from bad_options import BAD_OPTIONS

from trident_client import BadRequest, NotFound

if TYPE_CHECKING:
    from soak_load import Load

REQUEST_SECONDS = 120.0
"""A request that takes longer counts as hung."""
_WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "été", "日本", "🙂"]
_SHARED = [" ".join(random.Random(index).choices(_WORDS, k=120)) for index in range(8)]
"""Beginnings that many prompts share."""
_BROKEN_BODIES = (b"", b"{", b"[]", b'{"text_input": 1}', b'{"text_input": "a", "stop": ["b"]}', b"\xff\xfe")


class WrongAnswer(Exception):
    """The server answered, but not what was asked."""


async def _stream(load: Load, rng: random.Random) -> None:
    await load.ask(_prompt(rng), _options(rng), stream=True)


async def _whole(load: Load, rng: random.Random) -> None:
    await load.ask(_prompt(rng), _options(rng), stream=False)


async def _samples(load: Load, rng: random.Random) -> None:
    await load.ask(_prompt(rng), {**_options(rng), "n": rng.randint(2, 4)}, stream=rng.random() < 0.5)


async def _chat(load: Load, rng: random.Random) -> None:
    messages = [{"role": "user", "content": _prompt(rng)}]
    await load.ask(messages, _options(rng), stream=True)


async def _long(load: Load, rng: random.Random) -> None:
    """A prompt that takes most of the context, in tokens of one byte each; less in those of a trained tokenizer."""
    length = int(load.max_model_len * rng.uniform(0.5, 0.9))
    await load.ask("".join(rng.choices("abcdefgh ", k=length)), _options(rng, most=16), stream=True)


async def _shared(load: Load, rng: random.Random) -> None:
    """A greedy answer to one of a few prompts: the same text every time."""
    prompt = f"{rng.choice(_SHARED)} {rng.randrange(8)}"
    answer = await load.ask(prompt, {"temperature": 0, "max_tokens": 24}, stream=True)
    if load.texts.setdefault(prompt, answer.text) != answer.text:
        raise WrongAnswer(f"{answer.text!r} instead of {load.texts[prompt]!r}")


async def _cancelled(load: Load, rng: random.Random) -> None:
    """A reader that leaves after a few chunks."""
    left = rng.randint(0, 8)
    options = {**_options(rng), "max_tokens": 400, "ignore_eos": True}
    async with aclosing(load.client.generate(_prompt(rng), timeout=REQUEST_SECONDS, **options)) as chunks:
        async for _ in chunks:
            left -= 1
            if left < 0:
                return


async def _late(load: Load, rng: random.Random) -> None:
    """A request that its own time limit ends."""
    fields = {"text_input": _prompt(rng), "max_tokens": 400, "ignore_eos": True, "timeout": 0.2}
    status, body = await load.post("llm", "generate", json.dumps(fields).encode())
    if status != 200 or "text_output" not in json.loads(body):
        raise WrongAnswer(f"{status}: {body[:200]!r}")


async def _http(load: Load, rng: random.Random) -> None:
    model = rng.choice(("llm", "llm_vllm"))
    status, body = await load.post(model, "generate", _body(rng, stream=False))
    if status != 200 or "text_output" not in json.loads(body):
        raise WrongAnswer(f"{status}: {body[:200]!r}")


async def _events(load: Load, rng: random.Random) -> None:
    status, body = await load.post(rng.choice(("llm", "llm_vllm")), "generate_stream", _body(rng, stream=True))
    if status != 200 or b"data: " not in body or b'"error"' in body:
        raise WrongAnswer(f"{status}: {body[:200]!r}")


async def _closed(load: Load, rng: random.Random) -> None:
    """A browser that closes its window."""
    path = f"/v2/models/{rng.choice(('llm', 'llm_vllm'))}/generate_stream"
    async with load.session.post(path, data=_body(rng, stream=True, max_tokens=300)) as response:
        await response.content.readline()
        response.close()


async def _bad(load: Load, rng: random.Random) -> None:
    """An option that is not allowed, or a prompt that does not fit."""
    name, value = rng.choice(BAD_OPTIONS)
    options = {**_options(rng), name: value}
    prompt = _prompt(rng) if rng.random() < 0.8 else rng.choice(("", "ab " * 3 * load.max_model_len))
    try:
        await load.client.generate(prompt, stream=False, timeout=REQUEST_SECONDS, **options)
    except BadRequest:
        return
    raise WrongAnswer(f"{options} was not refused")


async def _broken(load: Load, rng: random.Random) -> None:
    """A body that is no request."""
    status, _ = await load.post(rng.choice(("llm", "llm_vllm")), "generate", rng.choice(_BROKEN_BODIES))
    if status < 400:
        raise WrongAnswer(f"status {status}")


async def _adapted(load: Load, rng: random.Random) -> None:
    """A greedy answer with an adapter: the same text every time, whether it has been replaced or not."""
    name = rng.choice(load.adapters)
    prompt = rng.choice(_SHARED)
    try:
        answer = await load.ask(prompt, {"temperature": 0, "max_tokens": 16, "adapter": name}, stream=True)
    except NotFound as error:
        if name == load.adapters[-1] and name in str(error):
            return
        raise
    if load.texts.setdefault(f"{name} {prompt}", answer.text) != answer.text:
        raise WrongAnswer(f"{answer.text!r} instead of {load.texts[f'{name} {prompt}']!r}")


async def _changed(load: Load, rng: random.Random) -> None:
    """An adapter is replaced, or comes or goes."""
    *kept, last = load.adapters
    async with load.changing:
        if kept and rng.random() < 0.5:
            name = rng.choice(kept)
            await load.client.load_adapter(name, name, timeout=REQUEST_SECONDS)
        elif load.last_is_loaded:
            await load.client.unload_adapter(last, timeout=REQUEST_SECONDS)
            load.last_is_loaded = False
        else:
            await load.client.load_adapter(last, last, timeout=REQUEST_SECONDS)
            load.last_is_loaded = True


GRPC_CANCELS = "cancelled"
"""The kind that a server before 25.03 may not survive: its gRPC frontend has a race between the end of a request and
its cancellation. Closed HTTP connections are cancelled, too, and by other code."""
ADAPTER_KINDS = {"adapted", "changed"}
KINDS: dict[str, tuple[int, Callable[[Load, random.Random], Awaitable[None]]]] = {
    "stream": (28, _stream),
    "whole": (14, _whole),
    "samples": (8, _samples),
    "chat": (5, _chat),
    "long": (4, _long),
    "shared": (12, _shared),
    GRPC_CANCELS: (8, _cancelled),
    "late": (3, _late),
    "http": (5, _http),
    "events": (4, _events),
    "closed": (8, _closed),
    "bad": (8, _bad),
    "broken": (2, _broken),
    "adapted": (8, _adapted),
    "changed": (2, _changed),
}
"""How often each kind of request comes, in relation to the others, and how it is sent."""


def _prompt(rng: random.Random) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(1, 60)))


def _options(rng: random.Random, most: int = 64) -> dict[str, Any]:
    """Random good options, ``max_tokens`` at most ``most``."""
    options: dict[str, Any] = {"max_tokens": rng.randint(1, most), "temperature": rng.choice((0, 0.7, 1.0))}
    choices: tuple[tuple[str, Any], ...] = (
        ("top_k", rng.randint(1, 50)),
        ("top_p", rng.uniform(0.5, 1.0)),
        ("stop", ["zz", "qx"]),
        ("logprobs", rng.randint(0, 3)),
        ("presence_penalty", 0.5),
        ("cache_salt", f"tenant {rng.randrange(4)}"),
        ("request_priority", rng.randint(-1, 1)),
        ("ignore_eos", True),
    )
    return options | {name: value for name, value in choices if rng.random() < 0.2}


def _body(rng: random.Random, *, stream: bool, max_tokens: int | None = None) -> bytes:
    count = max_tokens or rng.randint(1, 48)
    return json.dumps({"text_input": _prompt(rng), "stream": stream, "max_tokens": count}).encode()
