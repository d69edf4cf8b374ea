"""The two generation doors with a fake server around them and a fake engine behind."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.fakes import fake_backend_utils
from tests.fakes.engine_runs import Door, wait_until
from tests.fakes.fake_backend_utils import Request, Sender, Tensor
from tests.fakes.fake_engine import expected_text
from trident_llm.options import LLM_DEFAULTS, VLLM_DEFAULTS
from trident_llm.server import iterative
from trident_llm.server.engine_client import being_unloaded
from trident_llm.server.iterative import IterativeDoor
from trident_llm.server.request import RequestReader
from trident_llm.server.streaming import StreamingDoor

OpenDoor = Callable[..., Door]
STREAM: dict[str, object] = {"stream": True}


class IterativeServer:
    """Hands rescheduled requests back to ``execute``, as strategy direct does."""

    def __init__(self, door: IterativeDoor) -> None:
        self._door = door
        self._live: list[Request] = []
        self._senders: dict[int, Sender] = {}

    def add(self, sequence: int, prompt: str | bytes, *, starts: bool = True, **options: object) -> Sender:
        request = Request(prompt, sequence, starts=starts, options=options)
        self._live.append(request)
        self._senders[sequence] = request.sender
        return request.sender

    def drop(self, sequence: int) -> Request:
        """Cancel: the request does not come back. Returns what would have come."""
        (dropped,) = [request for request in self._live if request.sequence == sequence]
        self._live.remove(dropped)
        return dropped

    def restore(self, request: Request) -> None:
        self._live.append(request)

    def execute(self) -> None:
        """One execute, with a null request in between; a rescheduled request comes back as a new object."""
        self._door.execute([Request(), *self._live])
        for request in self._live:
            assert request.rescheduled != request.sender.is_final
        self._live = [
            Request(request.prompt, request.sequence, options=request.options, sender=self._senders[request.sequence])
            for request in self._live
            if request.rescheduled
        ]

    def execute_until_idle(self) -> None:
        while self._live:
            self.execute()


@pytest.fixture
def iterative_server(open_door: OpenDoor):
    client = open_door().client
    door = IterativeDoor(client, RequestReader(client.welcome, LLM_DEFAULTS))
    yield IterativeServer(door)
    door.close()


@pytest.fixture
def backing(open_door: OpenDoor) -> Door:
    """A second door to the same engine, for its statistics."""
    return open_door()


def test_iterative_door_streams_and_answers_once(iterative_server):
    streamed = iterative_server.add(5, "hello", max_tokens=40, **STREAM)
    whole = iterative_server.add(7, "there", max_tokens=30)
    refused = iterative_server.add(8, b"\xff", max_tokens=30)
    iterative_server.execute_until_idle()
    assert streamed.text == expected_text("hello", 40)
    assert len(streamed.responses) > 1
    assert whole.text == expected_text("there", 30)
    assert len(whole.responses) == 1
    assert refused.responses[0].error is not None
    assert refused.responses[0].error.code == fake_backend_utils.TritonError.INVALID_ARG


def test_requests_behind_the_first_are_seen_soon(iterative_server, monkeypatch):
    monkeypatch.setattr(iterative, "MIN_WAIT", 0.5)
    monkeypatch.setattr(iterative, "MAX_WAIT", 0.5)
    iterative_server.add(5, "<silent>", max_tokens=10, **STREAM)
    began = time.monotonic()
    iterative_server.execute()
    assert time.monotonic() - began < 0.4
    began = time.monotonic()
    iterative_server.execute()
    assert time.monotonic() - began > 0.4


def test_sequence_fields_are_not_for_clients(iterative_server):
    unknown = iterative_server.add(5, "hello", starts=False)
    iterative_server.execute()
    assert "sequence_start: missing" in unknown.responses[0].error.text
    first = iterative_server.add(6, "hello", max_tokens=20)
    second = Request("again", 6, starts=True)
    iterative_server.execute()
    iterative_server._door.execute([second])
    assert "already in use" in second.sender.responses[0].error.text
    iterative_server.execute_until_idle()
    assert first.text == expected_text("hello", 20)


def test_sequence_that_is_not_carried_is_freed(iterative_server, backing):
    iterative_server.add(5, "hello", max_tokens=4000, **STREAM)
    iterative_server.execute()
    iterative_server.drop(5)
    assert wait_until(lambda: backing.num_running() == 0) < 0.9


def test_sequence_that_comes_back_late_goes_on(iterative_server, backing):
    sender = iterative_server.add(5, "hello", max_tokens=300, **STREAM)
    iterative_server.execute()
    request = iterative_server.drop(5)
    wait_until(lambda: backing.num_running() == 0)
    iterative_server.restore(request)
    iterative_server.execute_until_idle()
    assert sender.text == expected_text("hello", 300)


def test_suspended_sequence_is_forgotten_in_the_end(iterative_server, monkeypatch):
    monkeypatch.setattr(iterative, "FORGET_AFTER", 0.6)
    sender = iterative_server.add(5, "hello", max_tokens=4000, **STREAM)
    iterative_server.execute()
    request = iterative_server.drop(5)
    wait_until(lambda: not iterative_server._door._sequences)
    iterative_server.restore(request)
    iterative_server.execute()
    assert "sequence_start: missing" in sender.responses[-1].error.text


def test_broken_sender_harms_its_request_alone(iterative_server, backing):
    good = iterative_server.add(5, "hello", max_tokens=50, **STREAM)
    bad = iterative_server.add(6, "there", max_tokens=4000, **STREAM)
    bad.broken = True
    while not bad.is_final and iterative_server._live[-1].sequence == 6:
        iterative_server._door.execute(iterative_server._live)
        iterative_server._live = [r for r in iterative_server._live if r.rescheduled]
        for request in iterative_server._live:
            request.rescheduled = request.starts = False
    iterative_server.execute_until_idle()
    assert good.text == expected_text("hello", 50)
    wait_until(lambda: backing.num_running() == 0, 1.0)


def test_silent_stream_gets_empty_responses(iterative_server):
    sender = iterative_server.add(5, "<silent>", max_tokens=5, timeout=1.0, **STREAM)
    iterative_server.execute_until_idle()
    assert 2 <= len(sender.responses) <= 5
    assert sender.text == ""


@pytest.fixture
def streaming_door(open_door: OpenDoor):
    client = open_door().client
    door = StreamingDoor(client, RequestReader(client.welcome, VLLM_DEFAULTS))
    yield door
    door.close()


def test_streaming_door_streams_and_answers_once(streaming_door):
    stream_input = Tensor("stream", np.array([True]))
    streamed = Request("hello", options={"max_tokens": 40}, tensors=[stream_input])
    whole = Request("there", options={"max_tokens": 30})
    refused = Request("there", options={"max_tokens": 0})
    streaming_door.execute([streamed, whole, refused])
    wait_until(lambda: streamed.sender.is_final and whole.sender.is_final)
    assert streamed.sender.text == expected_text("hello", 40)
    assert whole.sender.text == "there" + expected_text("there", 30)
    assert refused.sender.responses[0].error.text.startswith("[INVALID_ARG] max_tokens")


def test_streaming_door_notices_cancellation(streaming_door, backing):
    requests = [Request(prompt, options={"max_tokens": 4000}) for prompt in ("hello", "<silent>")]
    streaming_door.execute(requests)
    wait_until(lambda: backing.num_running() == 2)
    for request in requests:
        request.sender.cancelled = True
    assert wait_until(lambda: backing.num_running() == 0) < 1.0
    wait_until(lambda: all(request.sender.is_final for request in requests))
    assert requests[0].sender.responses[-1].error.text == "[CANCELLED] the request was cancelled"


def test_streaming_door_ends_its_streams_when_it_closes(open_door):
    client = open_door().client
    door = StreamingDoor(client, RequestReader(client.welcome, VLLM_DEFAULTS))
    request = Request("hello", options={"max_tokens": 4000, "stream": True})
    door.execute([request])
    wait_until(lambda: bool(request.sender.responses))
    door.close()
    assert request.sender.is_final
    late = Request("hello")
    door.execute([late])
    assert late.sender.is_final
    assert late.sender.responses[0].error.text.startswith("[UNAVAILABLE]")


def test_slow_sender_makes_responses_larger(streaming_door, monkeypatch):
    class SlowSender(Sender):
        def send(self, response, flags=0):
            time.sleep(0.05)
            super().send(response, flags)

    request = Request("hello", options={"max_tokens": 200, "stream": True}, sender=SlowSender())
    streaming_door.execute([request])
    wait_until(lambda: request.sender.is_final)
    assert request.sender.text == expected_text("hello", 200)
    assert len(request.sender.responses) < 60


def test_timeout_of_the_protocol_is_in_microseconds(streaming_door):
    request = Request("<silent>", options={"return_finish_reason": True}, timeout_us=200_000)
    began = time.monotonic()
    streaming_door.execute([request])
    wait_until(lambda: request.sender.is_final)
    assert 0.2 <= time.monotonic() - began < 1.0
    outputs = {tensor.name(): tensor.as_numpy()[0] for tensor in request.sender.responses[0].output_tensors}
    assert outputs["finish_reason"] == b"cancelled"


def test_requests_that_are_ended_get_the_error(iterative_server, streaming_door, backing):
    error = "[UNAVAILABLE] the model is being unloaded; retry after 2 s"
    streamed = iterative_server.add(5, "hello", max_tokens=4000, **STREAM)
    whole = iterative_server.add(6, "hello", max_tokens=4000)
    request = Request("hello", options={"max_tokens": 4000, "stream": True})
    streaming_door.execute([request])
    iterative_server.execute()
    wait_until(lambda: backing.num_running() == 3)
    assert (iterative_server._door.num_running, streaming_door.num_running) == (2, 1)
    iterative_server._door._client.end_all(being_unloaded())
    streaming_door._client.end_all(being_unloaded())
    iterative_server.execute_until_idle()
    wait_until(lambda: request.sender.is_final)
    for sender in (streamed, whole, request.sender):
        assert sender.is_final
        assert sender.responses[-1].error.text == error
        assert sender.responses[-1].error.code == fake_backend_utils.TritonError.UNAVAILABLE
    assert (iterative_server._door.num_running, streaming_door.num_running) == (0, 0)
    wait_until(lambda: backing.num_running() == 0, 1.0)
