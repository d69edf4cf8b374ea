"""The engine's loop and socket against doors that are slow, broken or gone."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.fakes.engine_runs import wait_until
from tests.fakes.fake_engine import FakeEngineCore, next_token
from trident_llm.config import EngineConfig
from trident_llm.deaths import Deaths
from trident_llm.engine import process
from trident_llm.engine.loop import EngineLoop
from trident_llm.engine.probation import TRIAL_TOKENS, Probation
from trident_llm.engine.transport import DoorSocket
from trident_llm.errors import LoadFailed
from trident_llm.protocol import (
    Abort,
    Command,
    CommandReply,
    Delta,
    Hello,
    SampleStart,
    SamplingParams,
    Shutdown,
    StepDeltas,
    Submit,
    ToDoor,
    ToEngine,
    TokenLogprobs,
    TopLogprob,
    Welcome,
)
from trident_llm.step_board import StepBoard, read_board

PROMPT = list(b"hello")
encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(ToDoor).decode


def submit(request_id: str, max_tokens: int = 10, output_ids: list[int] | None = None) -> Submit:
    params = SamplingParams(seed=1, max_tokens=max_tokens)
    start = SampleStart(index=0, output_ids=output_ids or [])
    return Submit(request_id=request_id, prompt_ids=PROMPT, params=params, samples=[start])


@dataclass
class RawDoor:
    """A door's socket without a client behind it; it reads only when told to."""

    socket: zmq.Socket[bytes]
    received: list[Delta] = field(default_factory=list)

    def send(self, message: ToEngine) -> None:
        self.socket.send(encode(message))

    def receive(self, timeout_ms: int = 5000) -> ToDoor:
        assert self.socket.poll(timeout_ms), "no message"
        return decode(self.socket.recv())

    def read_to_the_end(self, request_id: str) -> list[int]:
        """The token ids of one request, in order; raises when an offset does not fit."""
        ids: list[int] = []
        while True:
            message = self.receive()
            assert isinstance(message, StepDeltas)
            for delta in message.deltas:
                if delta.request_id == request_id:
                    self.received.append(delta)
                    assert delta.offset == len(ids)
                    ids += delta.token_ids
                    if delta.finish_reason is not None:
                        return ids


@dataclass
class RunningLoop:
    """An engine loop in a thread of this process."""

    address: str
    core: FakeEngineCore
    context: zmq.Context[zmq.Socket[bytes]]
    acquitted: list[Deaths]
    """What the probation wanted written down."""
    thread: threading.Thread
    board_path: Path

    def door(self) -> RawDoor:
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.RCVHWM, 1)
        socket.connect(self.address)
        door = RawDoor(socket)
        door.send(Hello(door="test"))
        assert isinstance(door.receive(), Welcome)
        return door


@pytest.fixture
def loop(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RunningLoop]:
    config = EngineConfig(model="fake")
    core = FakeEngineCore(config, step_time=0.0)
    address = f"inproc://engine-{tmp_path.name}"
    max_pending = getattr(request, "param", 1 << 20)
    context = zmq.Context()
    socket = DoorSocket(address, "epoch-1", max_pending=max_pending, context=context)
    deaths = Deaths(total=2, counts={"suspect": 2, "there-once": 1}, condemned={"poison": 3})
    board = StepBoard(tmp_path / "board", config.max_num_seqs)
    acquitted: list[Deaths] = []
    probation = Probation(deaths, acquitted.append)
    engine = EngineLoop(core, socket, "epoch-1", board=board, probation=probation)
    thread = threading.Thread(target=engine.run)
    thread.start()
    running = RunningLoop(address, core, context, acquitted, thread, tmp_path / "board")
    yield running
    if thread.is_alive():
        running.door().send(Shutdown())
    thread.join(5.0)
    assert not thread.is_alive()
    socket.close()
    context.destroy(linger=0)


def expected(num_tokens: int) -> list[int]:
    return [next_token(PROMPT, 0, position) for position in range(num_tokens)]


def test_one_message_per_step_carries_all_deltas_of_a_door(loop):
    first, second = loop.door(), loop.door()
    for name in ("a", "b"):
        first.send(submit(name))
    second.send(submit("c"))
    assert second.read_to_the_end("c") == expected(10)
    assert first.read_to_the_end("b") == expected(10)
    assert {delta.request_id for delta in second.received} == {"c"}


def test_resubmission_continues_at_its_offset(loop):
    door = loop.door()
    door.send(submit("a", output_ids=expected(4)))
    message = door.receive()
    assert isinstance(message, StepDeltas)
    assert message.epoch == "epoch-1"
    assert (message.deltas[0].offset, message.deltas[0].token_ids) == (4, expected(5)[4:])


def test_malformed_messages_are_dropped(loop):
    door = loop.door()
    no_text = encode({"type": "abort", "request_id": "??"}).replace(b"??", b"\xf9\xf9")
    for garbage in (b"", b"\xc1", b"\x81\xa4type\xa4nope", encode({"type": "submit", "request_id": 5}), no_text):
        door.socket.send(garbage)
    door.send(submit("a"))
    assert door.read_to_the_end("a") == expected(10)


def test_bad_request_gets_an_error_delta_and_unknown_abort_nothing(loop):
    door = loop.door()
    door.send(Abort(request_id="unknown"))
    params = SamplingParams(seed=1, max_tokens=1)
    door.send(Submit(request_id="empty", prompt_ids=[], params=params))
    message = door.receive()
    assert isinstance(message, StepDeltas)
    assert message.deltas[0].finish_reason == "error"
    assert message.deltas[0].error.startswith("[INVALID_ARG] prompt")
    wait_until(lambda: (state := read_board(loop.board_path)) is not None and not state.request_ids)


def test_unknown_command_lists_the_known(loop):
    door = loop.door()
    door.send(Command(command_id=7, command="reboot"))
    reply = door.receive()
    assert isinstance(reply, CommandReply)
    assert reply.command_id == 7
    assert reply.error.startswith("[INVALID_ARG] command: 'reboot' is not one of stats, config, health, ")


def test_slow_door_gets_larger_messages_and_slows_nobody(loop):
    slow, quick = loop.door(), loop.door()
    slow.send(submit("slow", max_tokens=4000))
    began = time.monotonic()
    quick.send(submit("quick", max_tokens=2000))
    assert quick.read_to_the_end("quick") == expected(2000)
    assert time.monotonic() - began < 5.0
    wait_until(lambda: not loop.core.has_work())
    assert slow.read_to_the_end("slow") == expected(4000)
    assert max(len(delta.token_ids) for delta in slow.received) > 100


@pytest.mark.parametrize("loop", [500], indirect=True)
def test_door_that_does_not_read_loses_its_requests(loop):
    stalled, other = loop.door(), loop.door()
    stalled.send(submit("stalled", max_tokens=4000))
    other.send(submit("other", max_tokens=3000))
    assert other.read_to_the_end("other") == expected(3000)
    wait_until(lambda: not loop.core.has_work(), 2.0)
    deltas = []
    while not deltas or deltas[-1].finish_reason is None:
        message = stalled.receive()
        assert isinstance(message, StepDeltas)
        deltas += message.deltas
    assert "stalled" in deltas[-1].error
    stalled.send(submit("again", max_tokens=20))
    assert stalled.read_to_the_end("again") == expected(20)


def test_requests_of_a_dead_door_are_freed(loop):
    door = loop.door()
    door.send(submit("a", max_tokens=10**9))
    wait_until(loop.core.has_work)
    door.socket.close(linger=0)
    wait_until(lambda: not loop.core.has_work(), 2.0)


def test_merged_deltas_keep_everything(tmp_path):
    context = zmq.Context()
    socket = DoorSocket(f"inproc://merge-{tmp_path.name}", "epoch", context=context)
    door = RawDoor(context.socket(zmq.DEALER))
    door.socket.connect(f"inproc://merge-{tmp_path.name}")
    door.send(Hello(door="test"))
    (hello,) = socket.receive(1000)
    row = TokenLogprobs(token_id=1, logprob=-1.0, rank=1, top=[TopLogprob(token_id=1, logprob=-1.0)])
    last = Delta(request_id="a", sample_index=0, offset=6, token_ids=[9], finish_reason="stop", stopped_by_token=True)
    for delta in (
        Delta(request_id="a", sample_index=0, offset=3, token_ids=[1], logprobs=[row], num_cached_tokens=16),
        Delta(request_id="a", sample_index=0, offset=4, token_ids=[2, 3], logprobs=[row, row]),
        Delta(request_id="b", sample_index=0, offset=0, token_ids=[5]),
        last,
    ):
        socket.post_delta(hello.door, delta)
    assert socket.flush().gone == []
    message = door.receive()
    assert isinstance(message, StepDeltas)
    merged, other = message.deltas
    assert other.token_ids == [5]
    assert (merged.offset, merged.token_ids, merged.logprobs) == (3, [1, 2, 3, 9], [row] * 3)
    assert (merged.finish_reason, merged.stopped_by_token, merged.num_cached_tokens) == ("stop", True, 16)
    socket.close()
    context.destroy(linger=0)


def test_suspects_run_alone_and_the_condemned_not_at_all(loop):
    door = loop.door()
    door.send(submit("poison.3"))
    message = door.receive()
    assert isinstance(message, StepDeltas)
    assert message.deltas[0].error.startswith("[INTERNAL] the engine broke 3 times")
    door.send(submit("other", max_tokens=5))
    time.sleep(0.1)
    assert not loop.core.has_work()
    door.send(submit("suspect.1", max_tokens=20))
    tokens: dict[str, list[int]] = {}
    while len(tokens.get("suspect.1", ())) < 20 or len(tokens.get("other", ())) < 5:
        message = door.receive()
        assert isinstance(message, StepDeltas)
        for delta in message.deltas:
            assert delta.request_id == "suspect.1" or len(tokens["suspect.1"]) >= TRIAL_TOKENS
            tokens[delta.request_id] = tokens.get(delta.request_id, []) + delta.token_ids
    assert tokens == {"suspect.1": expected(20), "other": expected(5)}
    assert [deaths.counts for deaths in loop.acquitted] == [{"there-once": 1}]


def test_no_new_requests_while_the_engine_is_being_ended(loop):
    door = loop.door()
    door.send(submit("running", max_tokens=2000))
    wait_until(loop.core.has_work)
    door.send(Shutdown(drain_timeout=20.0))
    door.send(submit("late"))
    ids: list[int] = []
    refused = ""
    while len(ids) < 2000 or not refused:
        message = door.receive()
        assert isinstance(message, StepDeltas)
        for delta in message.deltas:
            ids += delta.token_ids
            refused = refused or delta.error
    assert ids == expected(2000)
    assert refused == "[UNAVAILABLE] the engine is being ended; retry after 2 s"
    loop.thread.join(1.0)
    assert not loop.thread.is_alive()


def test_the_end_does_not_wait_longer_than_it_should(loop):
    door = loop.door()
    door.send(submit("running", max_tokens=10**9))
    wait_until(loop.core.has_work)
    door.send(Shutdown(drain_timeout=0.2))
    loop.thread.join(1.0)
    assert not loop.thread.is_alive()


def test_the_socket_takes_this_user_alone(monkeypatch: pytest.MonkeyPatch):
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        for user, is_served in ((os.getuid(), True), (os.getuid() + 1, False)):
            monkeypatch.setattr(os, "getuid", lambda user=user: user)
            socket = DoorSocket(f"ipc://{folder}/{user}", "epoch", context=context)
            door = context.socket(zmq.DEALER)
            door.connect(f"ipc://{folder}/{user}")
            door.send(encode(Hello(door="test")))
            assert bool(socket.receive(300)) == is_served
            door.close(linger=0)
            socket.close()


@pytest.mark.parametrize("logprobs", [[], [float("nan")], [-1.0, -1.0]])
def test_an_engine_that_does_not_generate_a_token_is_not_ready(monkeypatch: pytest.MonkeyPatch, logprobs: list[float]):
    core = FakeEngineCore(EngineConfig(model="fake"), step_time=0.0)
    assert process._prove(core)["output_tokens_total"] == 1
    rows = [TokenLogprobs(token_id=1, logprob=logprob, rank=1, top=[]) for logprob in logprobs]

    def step() -> list[Delta]:
        core.abort("readiness")
        return [Delta(request_id="readiness", sample_index=0, offset=0, token_ids=[1], logprobs=rows)]

    monkeypatch.setattr(core, "step", step)
    with pytest.raises(LoadFailed, match="test generation"):
        process._prove(core)
