"""Whatever bytes come over the socket, the engine goes on serving.

``TRIDENT_FUZZ_EXAMPLES=100000`` in the environment makes it a run of many minutes; ``load_tests/fuzz.py`` lets coverage
guide it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes.fake_engine import FakeEngineCore, next_token
from trident_llm.config import EngineConfig
from trident_llm.deaths import Deaths
from trident_llm.engine.loop import EngineLoop
from trident_llm.engine.probation import Probation
from trident_llm.engine.transport import DoorSocket
from trident_llm.protocol import Abort, Command, Hello, SamplingParams, Shutdown, StepDeltas, Submit, ToDoor
from trident_llm.step_board import StepBoard

fuzz = settings(
    max_examples=int(os.environ.get("TRIDENT_FUZZ_EXAMPLES", "100")),
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(ToDoor).decode
PROMPT = [5, 6, 7]
GOOD = [
    encode(message)
    for message in (
        Hello(door="d"),
        Submit(request_id="x", prompt_ids=PROMPT, params=SamplingParams(seed=1, max_tokens=2)),
        Abort(request_id="x", sample_index=0),
        Command(command_id=1, command="stats", arguments={"a": [1]}),
    )
]
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=10,
)
TYPES = st.sampled_from(["hello", "submit", "abort", "command", "welcome", ""])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A message of which some bytes were changed, cut off or put in."""
    data = bytearray(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(data) - 1)) if data else 0
        match draw(st.sampled_from(["change", "cut", "insert"])):
            case "change" if data:
                data[position] = draw(st.integers(0, 255))
            case "cut":
                del data[position:]
            case _:
                data[position:position] = draw(st.binary(max_size=8))
    return bytes(data)


FIELDS = st.dictionaries(st.text(), VALUES, max_size=4)
TAGGED = st.builds(lambda kind, fields: encode({"type": kind, **fields}), TYPES, FIELDS)
FRAMES = st.lists(st.one_of(st.binary(max_size=200), damaged(), TAGGED, VALUES.map(encode)), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zmq.Socket[bytes]]:
    with serving_door(tmp_path_factory.mktemp("fuzz")) as door:
        yield door


@contextlib.contextmanager
def serving_door(folder: Path) -> Iterator[zmq.Socket[bytes]]:
    """The door's end of a socket to an engine's loop in a thread."""
    context = zmq.Context()
    config = EngineConfig(model="fake")
    core = FakeEngineCore(config, step_time=0.0)
    socket = DoorSocket("inproc://fuzz", "epoch", context=context)
    board = StepBoard(folder / "board", config.max_num_seqs)
    loop = EngineLoop(core, socket, "epoch", board=board, probation=Probation(Deaths(), lambda deaths: None))
    thread = threading.Thread(target=loop.run)
    thread.start()
    door: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    door.connect("inproc://fuzz")
    yield door
    door.send(encode(Shutdown()))
    thread.join(5.0)
    assert not thread.is_alive()
    door.close(linger=0)
    socket.close()
    context.destroy(linger=0)


_numbers = iter(range(10**9))


@fuzz
@given(FRAMES)
def test_the_engine_goes_on_serving(door: zmq.Socket[bytes], frames: list[bytes]):
    send_and_ask(door, frames)


def send_and_ask(door: zmq.Socket[bytes], frames: list[bytes]) -> None:
    """A good request after the frames gets its tokens."""
    door.send_multipart(frames)
    name = f"good-{next(_numbers)}"
    door.send(encode(Submit(request_id=name, prompt_ids=PROMPT, params=SamplingParams(seed=1, max_tokens=3))))
    ids: list[int] = []
    while len(ids) < 3:
        assert door.poll(3000), "no answer"
        message = decode(door.recv())
        if isinstance(message, StepDeltas):
            ids += [token for delta in message.deltas if delta.request_id == name for token in delta.token_ids]
    assert ids == [next_token(PROMPT, 0, position) for position in range(3)]
