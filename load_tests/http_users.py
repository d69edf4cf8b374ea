"""Users over HTTP: one that reads slowly, one that leaves.

They have connections of their own, because a gRPC connection is shared: what one stream does not read, gRPC reads for
it, and the Triton servers before 25.03 can break when a gRPC call is cancelled.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import gevent
from event_stream import EventStream
from load_user import REQUEST_SECONDS, LoadUser, WrongAnswer, check_answer
from locust import task
from profiles import Span

EVENTS_A_SECOND = 10
"""What a slow reader takes."""
RECEIVE_BUFFER = 4096
"""Bytes that wait in a slow reader's socket; the rest waits in the server."""
PATIENCE = Span(low=1, high=64)
"""Tokens after which a canceller leaves."""
ENDLESS = 1024
"""Tokens that a canceller asks for."""


class HttpUser(LoadUser):
    abstract = True

    def events(self, options: dict[str, Any], receive_buffer: int | None = None) -> Iterator[tuple[int, str | None]]:
        """Number of new tokens and reason of the end of each event. Closing the generator cancels the request."""
        fields = {
            "text_input": self.text(self.sample(self.profile.prompt_tokens)),
            "stream": True,
            "return_num_output_tokens": True,
            "return_finish_reason": True,
            **options,
        }
        with EventStream(
            self.plan.http, "llm", fields, timeout=REQUEST_SECONDS, receive_buffer=receive_buffer
        ) as stream:
            for event in stream:
                if "error" in event:
                    raise WrongAnswer(str(event["error"]))
                reason = event["finish_reason"]
                count = int(event["num_output_tokens"])
                self.count_tokens(count)
                yield count, None if reason == "None" else reason


class SlowReader(HttpUser):
    """Reads a few events a second, however fast they come, and must get every token in the end."""

    kind = "slow_reader"

    @task
    def read(self) -> None:
        options, start = self.options(), time.perf_counter()
        first_token, num_tokens, last_reason = None, 0, None
        with self.reporting_failures():
            for count, reason in self.events(options, RECEIVE_BUFFER):
                if count and first_token is None:
                    first_token = 1e3 * (time.perf_counter() - start)
                num_tokens += count
                last_reason = reason or last_reason
                gevent.sleep(1 / EVENTS_A_SECOND)
            check_answer(last_reason, num_tokens, options)
            self.report(
                time_to_first_token=first_token,
                request=1e3 * (time.perf_counter() - start),
                output_tokens=num_tokens,
            )


class Canceller(HttpUser):
    """Leaves after a few tokens of a long answer."""

    kind = "canceller"

    @task
    def leave(self) -> None:
        options = {**self.options(), "max_tokens": ENDLESS, "ignore_eos": True}
        left, start = self.sample(PATIENCE), time.perf_counter()
        first_token, num_tokens = None, 0
        with self.reporting_failures("cancelled"):
            events = self.events(options)
            try:
                while num_tokens < left:
                    count, _ = next(events)
                    if count and first_token is None:
                        first_token = 1e3 * (time.perf_counter() - start)
                    num_tokens += count
            except StopIteration:
                raise WrongAnswer(f"ended after {num_tokens} tokens of {ENDLESS}") from None
            finally:
                events.close()
            self.report(
                time_to_first_token=first_token,
                cancelled=1e3 * (time.perf_counter() - start),
                output_tokens=num_tokens,
            )
