"""The workloads of workloads.py through a running Triton server, as its streaming clients see them."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from client_pool import BenchFailed, ClientPool, Run
from served_model import CpuSeconds, ServedModel
from workloads import Shape, mixed_shapes

from trident_client import TridentClient, TridentError

_ALPHABETS = (string.ascii_letters + string.digits, string.digits)
"""Tried in order: a prompt of n characters must be n tokens. Most trained tokenizers part digits, at least."""
_PROBES = (64, 128)
_PROBE_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Random texts of an exact number of tokens."""

    rng: random.Random
    alphabet: str
    """Each character is one token, whatever stands beside it."""
    num_added: int
    """Tokens that the tokenizer adds to each prompt, such as one for its beginning."""

    @classmethod
    def of_server(cls, client: TridentClient, seed: int = 0) -> Prompts:
        """Learns from the server's own counts how it tokenizes. Raises ``BenchFailed`` if no alphabet fits."""
        rng = random.Random(seed)
        for alphabet in _ALPHABETS:
            added = {_num_tokens(client, _random_text(rng, alphabet, length)) - length for length in _PROBES}
            if len(added) == 1 and min(added) >= 0:
                return cls(rng=rng, alphabet=alphabet, num_added=added.pop())
        raise BenchFailed(
            "--model: its tokenizer has no characters that are always one token, so prompts of an exact "
            "length cannot be made; use load_format=dummy with a folder that has no tokenizer"
        )

    def make(self, num_tokens: int) -> str:
        return _random_text(self.rng, self.alphabet, num_tokens - self.num_added)


@dataclass(frozen=True, kw_only=True)
class Cores:
    """CPU cores in use on average during one run."""

    clients: float
    server: float
    doors: float
    engine: float

    def __str__(self) -> str:
        kinds = ("clients", "server", "doors", "engine")
        return "cores: " + ", ".join(f"{kind} {getattr(self, kind):.2f}" for kind in kinds)


class ServerBench:
    """Runs workloads on one server with fresh random prompts each time."""

    def __init__(self, server: ServedModel, clients: ClientPool) -> None:
        self._server, self._clients = server, clients
        with TridentClient(server.address) as client:
            self._prompts = Prompts.of_server(client)
        self._stats = self._read_stats()

    def run(self, shapes: Sequence[Shape]) -> Run:
        prompts = [self._prompts.make(shape.prompt_tokens) for shape in shapes]
        before = self._server.cpu_seconds()
        run = self._clients.run(prompts, [shape.new_tokens for shape in shapes])
        used = self._server.cpu_seconds() - before
        if len(shapes) > 1:
            print(f"  {run.seconds:.2f} s, {run.output_tokens / run.responses:.2f} tokens a response, "
                  f"{_cores(run, used)}, busiest client {run.client_cpu_share:.0%} of one", flush=True)  # fmt: skip
        return run

    def check_stats(self) -> int:
        """Preemptions since the last call. Raises ``BenchFailed`` when the engine was restarted meanwhile."""
        before, self._stats = self._stats, self._read_stats()
        if self._stats["engine_restarts"] != before["engine_restarts"]:
            raise BenchFailed("the engine was restarted during the benchmark")
        return int(self._stats["preemptions_total"] - before["preemptions_total"])

    def one_stream(self) -> dict[str, float]:
        """Tokens/s of a lone stream after its first token."""
        whole, first = self.run([Shape(128, 257)]).seconds, self.run([Shape(128, 1)]).seconds
        return {"output_tok_s": 256 / (whole - first)}

    def first_token(self, prompt_tokens: int) -> dict[str, float]:
        """Milliseconds from submission to the first token of a lone request."""
        return {"ms": self.run([Shape(prompt_tokens, 1)]).first_token_ms(0.5)}

    def streams(self, count: int, new_tokens: int) -> dict[str, float]:
        """Output tokens/s of ``count`` equal requests that arrive together."""
        run = self.run([Shape(128, new_tokens)] * count)
        return {"output_tok_s": run.output_tokens / run.seconds, **_delivery(run)}

    def mixed(self) -> dict[str, float]:
        """Requests/s of ``mixed_shapes``."""
        run = self.run(mixed_shapes())
        return {"req_s": len(run.streams) / run.seconds, **_delivery(run)}

    def _read_stats(self) -> Mapping[str, float]:
        with TridentClient(self._server.address) as client:
            return client.stats()


SERVER_WORKLOADS: dict[str, Callable[[ServerBench], dict[str, float]]] = {
    "one_stream": lambda bench: bench.one_stream(),
    "first_token_128": lambda bench: bench.first_token(128),
    "first_token_2048": lambda bench: bench.first_token(2048),
    "streams_64": lambda bench: bench.streams(64, 256),
    "streams_256": lambda bench: bench.streams(256, 256),
    "mixed_1000": lambda bench: bench.mixed(),
    "streams_1000": lambda bench: bench.streams(1000, 64),
}
"""Each returns its measurements by metric, the main one first."""


def _delivery(run: Run) -> dict[str, float]:
    return {
        "first_token_p50_ms": run.first_token_ms(0.5),
        "first_token_p99_ms": run.first_token_ms(0.99),
        "client_cpu_share": run.client_cpu_share,
    }


def _cores(run: Run, used: CpuSeconds) -> Cores:
    return Cores(
        clients=run.client_cpu_seconds / run.seconds,
        server=used.server / run.seconds,
        doors=used.doors / run.seconds,
        engine=used.engine / run.seconds,
    )


def _random_text(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=length))


def _num_tokens(client: TridentClient, text: str) -> int:
    """How many tokens the server counts in ``text``."""
    try:
        answer = client.generate(text, stream=False, timeout=_PROBE_SECONDS, max_tokens=1)
    except TridentError as error:
        raise BenchFailed(f"the first request failed: {error}") from None
    return answer.num_input_tokens or 0
