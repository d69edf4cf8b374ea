"""The base of all users of the load test: what they know of the run, how they ask, and how they report.

Importing this module makes gRPC cooperate with gevent; locust has patched the standard library before.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, ClassVar

import grpc.experimental.gevent
from gevent import GreenletExit
from load_plan import Plan
from load_records import Recorder, RequestRecord
from locust import User
from profiles import EVENTS, Span
from timing import Answer, read_answer

from trident_client import RetryPolicy, TridentClient, TridentError

grpc.experimental.gevent.init_gevent()

REQUEST_SECONDS = 120.0
"""A request that takes longer counts as hung."""
ENDED = ("stop", "length")
Prompt = str | Sequence[Mapping[str, Any]]


class WrongAnswer(Exception):
    """The server answered, but not what was asked."""


class LoadUser(User):
    """One person at the server. A failed request is reported and never retried.

    ``plan`` and ``recorder`` are set before users start; both are the process's.
    """

    abstract = True
    kind: ClassVar[str]
    plan: ClassVar[Plan]
    recorder: ClassVar[Recorder]
    _numbers: ClassVar[Iterator[int]] = itertools.count()
    _client: ClassVar[TridentClient | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        worker = getattr(self.environment.runner, "worker_index", 0)
        self.random = random.Random(f"{self.plan.seed} {worker} {next(self._numbers)}")
        self.profile = self.plan.profile

    @property
    def client(self) -> TridentClient:
        """One for all users of the process, so that they share a connection: it costs the least."""
        if LoadUser._client is None:
            LoadUser._client = TridentClient(self.plan.grpc, retry=RetryPolicy(retries=0))
        return LoadUser._client

    def wait_time(self) -> float:
        return self.profile.pause * self.random.uniform(0.5, 1.5)

    def text(self, num_tokens: int) -> str:
        """Random text, so that no cache helps; with what the tokenizer adds it has ``num_tokens`` tokens."""
        return "".join(self.random.choices(self.plan.alphabet, k=max(num_tokens - self.plan.num_added, 1)))

    def sample(self, span: Span) -> int:
        return self.random.randint(span.low, span.high)

    def options(self) -> dict[str, Any]:
        """Of an ordinary request."""
        return {
            "max_tokens": self.sample(self.profile.max_tokens),
            "ignore_eos": self.profile.ignore_eos,
            "seed": self.random.getrandbits(32),
            **({"xlora": False} if self.plan.has_mix else {}),
        }

    def ask(self, prompt: Prompt, options: Mapping[str, Any]) -> Answer | None:
        """One streamed answer, checked and reported; None when it failed."""
        with self.reporting_failures():
            chunks = self.client.generate(prompt, timeout=REQUEST_SECONDS, **options)
            with closing(chunks):
                answer = read_answer(chunks, self.count_tokens)
            check_answer(answer.finish_reason, answer.num_output_tokens, options)
            between = answer.between_tokens
            self.report(
                time_to_first_token=1e3 * answer.first_token,
                time_between_tokens=None if between is None else 1e3 * between,
                longest_gap=1e3 * max(answer.gaps) if answer.gaps else None,
                request=1e3 * answer.total,
                output_tokens=answer.num_output_tokens,
            )
            return answer
        return None

    def count_tokens(self, count: int) -> None:
        self.recorder.add_tokens(time.time(), count)

    def report(self, *, error: str = "", output_tokens: int = 0, **events: float | None) -> None:
        """One request, to the run's records and to locust's statistics. ``events``: milliseconds by name."""
        record = RequestRecord(
            kind=self.kind, ended=time.time(), error=error, output_tokens=output_tokens, **events
        )
        self.recorder.add(record)
        failure = Exception(error) if error else None
        for name in EVENTS:
            value = getattr(record, name)
            if value is not None:
                self.environment.events.request.fire(
                    request_type=self.kind,
                    name=name,
                    response_time=value,
                    response_length=output_tokens,
                    exception=failure,
                    context={},
                )

    @contextmanager
    def reporting_failures(self, event: str = "request") -> Iterator[None]:
        """Report what the block raises as the failure of a request, whose time is that of ``event``."""
        start = time.perf_counter()
        try:
            yield
        except (TridentError, WrongAnswer, OSError) as error:
            failure = f"{type(error).__name__}: {str(error)[:300]}"
            self.report(error=failure, **{event: 1e3 * (time.perf_counter() - start)})
        except GreenletExit:
            # At the end of a run, locust kills what has not finished within the stop timeout. It may also kill a user
            # whose pause has just ended: such a request is a moment old and says nothing about the server.
            seconds = time.perf_counter() - start
            if seconds > self.environment.stop_timeout / 2:
                self.report(error="not finished when the run was over", **{event: 1e3 * seconds})
            raise


def check_answer(finish_reason: str | None, num_tokens: int, options: Mapping[str, Any]) -> None:
    """Raise ``WrongAnswer`` unless the answer ended as it may, with as many tokens as it may have."""
    least = options["max_tokens"] if options["ignore_eos"] else 1
    if finish_reason not in ENDED:
        raise WrongAnswer(f"finish_reason {finish_reason}")
    if not least <= num_tokens <= options["max_tokens"]:
        raise WrongAnswer(f"{num_tokens} tokens of {options['max_tokens']}")
