"""Random requests of a soak: what they ask, what counts as a good answer, and how they are sent.

One ``Load`` sends them to one server at random moments. Knows nothing of processes or memory.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from bad_options import BAD_OPTIONS

from trident_client import AsyncTridentClient, BadRequest, Completion, NotFound, RetryPolicy, TridentError

REQUEST_SECONDS = 120.0
"""A request that takes longer counts as hung."""
MAX_LIVE = 48
"""Requests of one load at a time; what comes later waits in the client."""
WARM_UP_TIMES = 4.0
"""How much more often than later requests come in a warm-up."""
_WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "été", "日本", "🙂"]
_SHARED = [" ".join(random.Random(index).choices(_WORDS, k=120)) for index in range(8)]
"""Beginnings that many prompts share."""
_BROKEN_BODIES = (b"", b"{", b"[]", b'{"text_input": 1}', b'{"text_input": "a", "stop": ["b"]}', b"\xff\xfe")
_ENDED = ("stop", "length")


class WrongAnswer(Exception):
    """The server answered, but not what was asked."""


@dataclass(kw_only=True)
class Load:
    """Sends random requests to the server at ``grpc`` and ``http`` (host:port each), ``rate`` a second on average.

    ``is_echo``: the server answers with any text, so good answers are not checked.
    """

    grpc: str
    http: str
    is_echo: bool
    rate: float
    max_model_len: int
    seed: int
    grpc_cancels: bool
    """Whether gRPC calls are cancelled, too."""
    adapters: tuple[str, ...] = ()
    """Names of loaded adapters, and of their folders. The last one comes and goes, the others are only replaced."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Requests sent, by kind."""
    errors: Counter[str] = field(default_factory=Counter)
    """What went wrong, by kind and text."""

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        left_out = {kind for kind in (GRPC_CANCELS,) if not self.grpc_cancels}
        left_out |= set() if self.adapters else ADAPTER_KINDS
        self._weights = {kind: weight for kind, (weight, _) in _KINDS.items() if kind not in left_out}
        self._changing = asyncio.Lock()
        self._last_is_loaded = True
        self._live = asyncio.Semaphore(MAX_LIVE)
        self._texts: dict[str, str] = {}
        """Greedy answers that must stay what they were."""
        self._client = AsyncTridentClient(self.grpc, retry=RetryPolicy(retries=0))
        self._session = aiohttp.ClientSession(
            f"http://{self.http}", timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        )

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()
        await self._session.close()

    @property
    def client(self) -> AsyncTridentClient:
        return self._client

    async def run(self, seconds: float, *, warm_up: bool = False) -> None:
        """Send requests for ``seconds``, and return when all have ended.

        ``warm_up``: as many at once as there may ever be, and then more often than otherwise.
        """
        end = time.monotonic() + seconds
        at_once, rate = (MAX_LIVE, WARM_UP_TIMES * self.rate) if warm_up else (0, self.rate)
        sent: list[asyncio.Task[None]] = []
        while time.monotonic() < end:
            if len(sent) >= at_once:
                await asyncio.sleep(self._rng.expovariate(rate))
            kind = self._rng.choices(list(self._weights), list(self._weights.values()))[0]
            # Drawn here, so that both servers of a soak get the same requests whatever their speed.
            rng = random.Random(self._rng.getrandbits(64))
            await self._live.acquire()
            sent.append(asyncio.create_task(self._send(kind, rng)))
        await asyncio.gather(*sent)

    async def _send(self, kind: str, rng: random.Random) -> None:
        self.kinds[kind] += 1
        try:
            await _KINDS[kind][1](self, rng)
        except (TridentError, WrongAnswer, aiohttp.ClientError, TimeoutError) as error:
            self.errors[f"{kind}: {type(error).__name__}: {str(error)[:200]}"] += 1
        finally:
            self._live.release()

    async def _ask(self, prompt: Any, options: dict[str, Any], *, stream: bool) -> Completion:
        """One whole answer over gRPC, checked."""
        if stream:
            chunks = self._client.generate(prompt, timeout=REQUEST_SECONDS, **options)
            answer = Completion.from_chunks([chunk async for chunk in chunks])
        else:
            answer = await self._client.generate(prompt, stream=False, timeout=REQUEST_SECONDS, **options)
        self._check(answer, options)
        return answer

    def _check(self, answer: Completion, options: dict[str, Any]) -> None:
        if self.is_echo:
            return
        if len(answer.samples) != options.get("n", 1):
            raise WrongAnswer(f"{len(answer.samples)} samples")
        for sample in answer.samples:
            if sample.finish_reason not in _ENDED:
                raise WrongAnswer(f"finish_reason {sample.finish_reason}")
            if not 1 <= (sample.num_output_tokens or 0) <= options["max_tokens"]:
                raise WrongAnswer(f"{sample.num_output_tokens} tokens of {options['max_tokens']}")

    async def _post(self, model: str, call: str, body: bytes) -> tuple[int, bytes]:
        async with self._session.post(f"/v2/models/{model}/{call}", data=body) as response:
            return response.status, await response.read()


async def _stream(load: Load, rng: random.Random) -> None:
    await load._ask(_prompt(rng), _options(rng), stream=True)


async def _whole(load: Load, rng: random.Random) -> None:
    await load._ask(_prompt(rng), _options(rng), stream=False)


async def _samples(load: Load, rng: random.Random) -> None:
    await load._ask(_prompt(rng), {**_options(rng), "n": rng.randint(2, 4)}, stream=rng.random() < 0.5)


async def _chat(load: Load, rng: random.Random) -> None:
    messages = [{"role": "user", "content": _prompt(rng)}]
    await load._ask(messages, _options(rng), stream=True)


async def _long(load: Load, rng: random.Random) -> None:
    """A prompt that takes most of the context, in tokens of one byte each; less in those of a trained tokenizer."""
    length = int(load.max_model_len * rng.uniform(0.5, 0.9))
    await load._ask("".join(rng.choices("abcdefgh ", k=length)), _options(rng, most=16), stream=True)


async def _shared(load: Load, rng: random.Random) -> None:
    """A greedy answer to one of a few prompts: the same text every time."""
    prompt = f"{rng.choice(_SHARED)} {rng.randrange(8)}"
    answer = await load._ask(prompt, {"temperature": 0, "max_tokens": 24}, stream=True)
    if load._texts.setdefault(prompt, answer.text) != answer.text:
        raise WrongAnswer(f"{answer.text!r} instead of {load._texts[prompt]!r}")


async def _cancelled(load: Load, rng: random.Random) -> None:
    """A reader that leaves after a few chunks."""
    left = rng.randint(0, 8)
    options = {**_options(rng), "max_tokens": 400, "ignore_eos": True}
    async with aclosing(load._client.generate(_prompt(rng), timeout=REQUEST_SECONDS, **options)) as chunks:
        async for _ in chunks:
            left -= 1
            if left < 0:
                return


async def _late(load: Load, rng: random.Random) -> None:
    """A request that its own time limit ends."""
    fields = {"text_input": _prompt(rng), "max_tokens": 400, "ignore_eos": True, "timeout": 0.2}
    status, body = await load._post("llm", "generate", json.dumps(fields).encode())
    if status != 200 or "text_output" not in json.loads(body):
        raise WrongAnswer(f"{status}: {body[:200]!r}")


async def _http(load: Load, rng: random.Random) -> None:
    model = rng.choice(("llm", "llm_vllm"))
    status, body = await load._post(model, "generate", _body(rng, stream=False))
    if status != 200 or "text_output" not in json.loads(body):
        raise WrongAnswer(f"{status}: {body[:200]!r}")


async def _events(load: Load, rng: random.Random) -> None:
    status, body = await load._post(rng.choice(("llm", "llm_vllm")), "generate_stream", _body(rng, stream=True))
    if status != 200 or b"data: " not in body or b'"error"' in body:
        raise WrongAnswer(f"{status}: {body[:200]!r}")


async def _closed(load: Load, rng: random.Random) -> None:
    """A browser that closes its window."""
    path = f"/v2/models/{rng.choice(('llm', 'llm_vllm'))}/generate_stream"
    async with load._session.post(path, data=_body(rng, stream=True, max_tokens=300)) as response:
        await response.content.readline()
        response.close()


async def _bad(load: Load, rng: random.Random) -> None:
    """An option that is not allowed, or a prompt that does not fit."""
    name, value = rng.choice(BAD_OPTIONS)
    options = {**_options(rng), name: value}
    prompt = _prompt(rng) if rng.random() < 0.8 else rng.choice(("", "ab " * 3 * load.max_model_len))
    try:
        await load._client.generate(prompt, stream=False, timeout=REQUEST_SECONDS, **options)
    except BadRequest:
        return
    raise WrongAnswer(f"{options} was not refused")


async def _broken(load: Load, rng: random.Random) -> None:
    """A body that is no request."""
    status, _ = await load._post(rng.choice(("llm", "llm_vllm")), "generate", rng.choice(_BROKEN_BODIES))
    if status < 400:
        raise WrongAnswer(f"status {status}")


async def _adapted(load: Load, rng: random.Random) -> None:
    """A greedy answer with an adapter: the same text every time, whether it has been replaced or not."""
    name = rng.choice(load.adapters)
    prompt = rng.choice(_SHARED)
    try:
        answer = await load._ask(prompt, {"temperature": 0, "max_tokens": 16, "adapter": name}, stream=True)
    except NotFound as error:
        if name == load.adapters[-1] and name in str(error):
            return
        raise
    if load._texts.setdefault(f"{name} {prompt}", answer.text) != answer.text:
        raise WrongAnswer(f"{answer.text!r} instead of {load._texts[f'{name} {prompt}']!r}")


async def _changed(load: Load, rng: random.Random) -> None:
    """An adapter is replaced, or comes or goes."""
    *kept, last = load.adapters
    async with load._changing:
        if kept and rng.random() < 0.5:
            name = rng.choice(kept)
            await load._client.load_adapter(name, name, timeout=REQUEST_SECONDS)
        elif load._last_is_loaded:
            await load._client.unload_adapter(last, timeout=REQUEST_SECONDS)
            load._last_is_loaded = False
        else:
            await load._client.load_adapter(last, last, timeout=REQUEST_SECONDS)
            load._last_is_loaded = True


GRPC_CANCELS = "cancelled"
"""The kind that a server before 25.03 may not survive: its gRPC frontend has a race between the end of a request and
its cancellation. Closed HTTP connections are cancelled, too, and by other code."""
ADAPTER_KINDS = {"adapted", "changed"}
_KINDS: dict[str, tuple[int, Callable[[Load, random.Random], Awaitable[None]]]] = {
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
