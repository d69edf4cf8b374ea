"""The load of a soak: random requests, sent to one server at random moments, and what went wrong with them.

Knows nothing of processes or memory.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from soak_requests import ADAPTER_KINDS, GRPC_CANCELS, KINDS, REQUEST_SECONDS, WrongAnswer

from trident_client import AsyncTridentClient, Completion, RetryPolicy, TridentError

MAX_LIVE = 48
"""Requests of one load at a time; what comes later waits in the client."""
WARM_UP_TIMES = 4.0
"""How much more often than later requests come in a warm-up."""
_ENDED = ("stop", "length")


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
        self._weights = {kind: weight for kind, (weight, _) in KINDS.items() if kind not in left_out}
        self.changing = asyncio.Lock()
        """Held while adapters change."""
        self.last_is_loaded = True
        """Whether the last adapter is."""
        self._live = asyncio.Semaphore(MAX_LIVE)
        self.texts: dict[str, str] = {}
        """Greedy answers that must stay what they were, by what was asked."""
        self.client = AsyncTridentClient(self.grpc, retry=RetryPolicy(retries=0))
        self.session = aiohttp.ClientSession(
            f"http://{self.http}", timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        )

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self.session.close()

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
            await KINDS[kind][1](self, rng)
        except (TridentError, WrongAnswer, aiohttp.ClientError, TimeoutError) as error:
            self.errors[f"{kind}: {type(error).__name__}: {str(error)[:200]}"] += 1
        finally:
            self._live.release()

    async def ask(self, prompt: Any, options: dict[str, Any], *, stream: bool) -> Completion:
        """One whole answer over gRPC, checked."""
        if stream:
            chunks = self.client.generate(prompt, timeout=REQUEST_SECONDS, **options)
            answer = Completion.from_chunks([chunk async for chunk in chunks])
        else:
            answer = await self.client.generate(prompt, stream=False, timeout=REQUEST_SECONDS, **options)
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

    async def post(self, model: str, call: str, body: bytes) -> tuple[int, bytes]:
        async with self.session.post(f"/v2/models/{model}/{call}", data=body) as response:
            return response.status, await response.read()
