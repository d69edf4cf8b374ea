"""GenerateUser: sends prompts of sampled lengths, reads the streamed answers and reports their times to locust.

Importing this module makes gRPC cooperate with gevent; locust has patched the standard library before.
"""

from __future__ import annotations

import itertools
import random
import time
from contextlib import closing
from typing import Any

import grpc.experimental.gevent
from gevent import GreenletExit
from locust import User, task

from load_tests.profiles import Profile, Span
from load_tests.timing import Timing, measure
from trident_client import RetryPolicy, TridentClient, TridentError

grpc.experimental.gevent.init_gevent()

_WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"]


class GenerateUser(User):
    """One reader: asks, reads the answer to its end, asks again. A failed request is reported and never retried.

    ``profile`` is set before users start. Events have the type ``grpc``: ``time_to_first_token``,
    ``time_between_tokens`` (one per chunk after the first) and ``request`` in milliseconds, and
    ``tokens_per_second``, whose value stands in the place of the time.
    """

    profile: Profile
    _numbers = itertools.count()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._random = random.Random(f"{self.profile.seed} {next(self._numbers)}")

    def on_start(self) -> None:
        self._client = TridentClient(self.environment.host, retry=RetryPolicy(retries=0))

    def on_stop(self) -> None:
        self._client.close()

    def wait_time(self) -> float:
        return self.profile.pause

    @task
    def generate(self) -> None:
        prompt = " ".join(self._random.choices(_WORDS, k=self._sample(self.profile.prompt_words)))
        answer = self._client.generate(
            prompt,
            max_tokens=self._sample(self.profile.max_tokens),
            ignore_eos=self.profile.ignore_eos,
            seed=self._random.getrandbits(32),
        )
        start = time.perf_counter()
        try:
            with closing(answer) as chunks:
                timing = measure(chunks)
        except TridentError as error:
            self._report("request", 1000 * (time.perf_counter() - start), exception=error)
        except GreenletExit:
            # At the end of a run, locust kills what has not finished within the stop timeout. It may also kill a user
            # whose pause has just ended: such a request is a moment old and says nothing about the server.
            seconds = time.perf_counter() - start
            if seconds > self.environment.stop_timeout / 2:
                self._report("request", 1000 * seconds, exception=TimeoutError("not finished when the run was over"))
            raise
        else:
            self._report_timing(timing)

    def _report_timing(self, timing: Timing) -> None:
        self._report("time_to_first_token", 1000 * timing.first_token)
        for gap in timing.gaps:
            self._report("time_between_tokens", 1000 * gap)
        if timing.tokens_per_second is not None:
            self._report("tokens_per_second", timing.tokens_per_second)
        self._report("request", 1000 * timing.total, length=timing.num_output_tokens)

    def _report(self, name: str, value: float, *, length: int = 0, exception: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type="grpc",
            name=name,
            response_time=value,
            response_length=length,
            exception=exception,
            context={},
        )

    def _sample(self, span: Span) -> int:
        return self._random.randint(span.low, span.high)
