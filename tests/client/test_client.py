"""TridentClient against a server that does what a script says."""

import gc
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import grpc
import pytest

from tests.fakes.fake_triton import Answer, Break, Fail, FakeTriton, Hang, Refuse
from trident_client import (
    BadRequest,
    Cancelled,
    EngineFailed,
    NotFound,
    Overloaded,
    RetryPolicy,
    TimedOut,
    TridentClient,
    TridentError,
)
from trident_client.deadline import Deadline

QUICK = RetryPolicy(retries=3, first_delay=0.01, max_delay=1.0)


def test_a_stream_arrives_piece_by_piece():
    with FakeTriton(Answer(("a", "b", "c"), delay=0.1)) as server, TridentClient(server.url) as client:
        start = time.monotonic()
        arrivals = [(chunk.text, chunk.finish_reason, time.monotonic() - start) for chunk in client.generate("Hi")]
    assert [(text, reason) for text, reason, _ in arrivals] == [("a", None), ("b", None), ("c", "stop")]
    assert arrivals[0][2] + 0.15 < arrivals[2][2]


def test_chunks_carry_counts():
    with FakeTriton(num_input_tokens=9) as server, TridentClient(server.url) as client:
        chunks = list(client.generate("Hi"))
    assert [(chunk.num_input_tokens, chunk.num_output_tokens) for chunk in chunks] == [(9, 1)] * 3


def test_a_whole_answer_asks_the_server_not_to_stream():
    with FakeTriton() as server, TridentClient(server.url) as client:
        answer = client.generate("Hi", stream=False, max_tokens=3)
        parameters = server.generations[0].parameters
    assert (answer.text, answer.finish_reason, answer.num_output_tokens) == ("Hello, world", "stop", 3)
    assert (parameters["stream"], parameters["max_tokens"]) == (False, 3)


def test_signs_of_life_are_no_chunks():
    with FakeTriton(Answer(("a",), alive=True)) as server, TridentClient(server.url) as client:
        assert [chunk.text for chunk in client.generate("Hi")] == ["a"]


def test_bad_arguments_raise_at_the_call_not_at_the_first_chunk():
    with TridentClient("localhost:1") as client:
        with pytest.raises(BadRequest, match="timeout: -1"):
            client.generate("Hi", timeout=-1)
        with pytest.raises(BadRequest, match="priority"):
            client.generate("Hi", priority=1)


@pytest.mark.parametrize("leave", ["close", "break", "exception", "drop"])
def test_leaving_a_stream_cancels_it(leave: str):
    with FakeTriton(Hang(("a",))) as server, TridentClient(server.url) as client:
        chunks = client.generate("Hi")
        assert next(chunks).text == "a"
        if leave == "close":
            chunks.close()
        elif leave == "break":
            del chunks
            for _ in client.generate("Hi again"):
                break
        elif leave == "exception":
            with pytest.raises(RuntimeError), closing(chunks):
                raise RuntimeError
        else:
            del chunks
            gc.collect()
        assert all(generation.cancelled.wait(1) for generation in server.generations)


def test_ctrl_c_while_waiting_for_a_chunk_cancels_it():
    with FakeTriton(Hang()) as server, TridentClient(server.url) as client:
        # Not before it waits: gRPC's own code would swallow the exception.
        thread = threading.Thread(target=_interrupt_once, args=(lambda: bool(server.generations),))
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            next(client.generate("Hi"))
        assert server.generations[0].cancelled.wait(1)
        thread.join()


def _interrupt_once(is_asked):
    """As Ctrl-C does, 0.3 s after ``is_asked``."""
    while not is_asked():
        time.sleep(0.01)
    time.sleep(0.3)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_a_finished_stream_was_not_cancelled():
    with FakeTriton() as server, TridentClient(server.url) as client:
        list(client.generate("Hi"))
        time.sleep(0.05)
        assert not server.generations[0].cancelled.is_set()


def test_closing_the_client_ends_its_streams():
    with FakeTriton(Hang(("a",))) as server:
        client = TridentClient(server.url)
        chunks = client.generate("Hi")
        next(chunks)
        client.close()
        with pytest.raises(Cancelled):
            next(chunks)
        assert server.generations[0].cancelled.wait(1)


def test_threads_share_a_client_and_one_cancels_without_disturbing_others():
    def read(prompt: str) -> str:
        return "".join(chunk.text for chunk in client.generate(prompt))

    with (
        FakeTriton(Hang(("x",)), Answer(tuple("abcdef"), delay=0.02)) as server,
        TridentClient(server.url) as client,
        ThreadPoolExecutor(32) as pool,
    ):
        hanging = client.generate("hang")
        next(hanging)
        answers = [pool.submit(read, f"prompt {i}") for i in range(32)]
        hanging.close()
        assert {answer.result(timeout=20) for answer in answers} == {"abcdef"}
        assert {generation.text_input for generation in server.generations} == {
            "hang",
            *(f"prompt {i}" for i in range(32)),
        }
        assert server.generations[0].cancelled.wait(1)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("[INVALID_ARG] top_p: 7 is not allowed", BadRequest, "top_p: 7 is not allowed"),
        ("[NOT_FOUND] adapter: 'x'", NotFound, "adapter: 'x'"),
        ("[INTERNAL] the engine broke", EngineFailed, "the engine broke"),
        ("[CANCELLED] deadline", Cancelled, "deadline"),
        ("no code at all", EngineFailed, "no code at all"),
    ],
)
def test_errors_keep_their_kind_and_are_not_retried(text: str, kind: type[TridentError], message: str):
    with FakeTriton(Fail(text)) as server, TridentClient(server.url, retry=QUICK) as client:
        with pytest.raises(kind) as caught:
            list(client.generate("Hi"))
        assert caught.value.message == message
        assert len(server.generations) == 1


@pytest.mark.parametrize("refusal", [Fail("[UNAVAILABLE] the queue is full"), Refuse()])
@pytest.mark.parametrize("stream", [True, False])
def test_unavailable_is_retried(refusal: Fail | Refuse, stream: bool):
    with FakeTriton(refusal, refusal, Answer(("ok",))) as server, TridentClient(server.url, retry=QUICK) as client:
        answer = client.generate("Hi", stream=stream)
        text = "".join(chunk.text for chunk in answer) if stream else answer.text
        assert text == "ok"
        assert len(server.generations) == 3


def test_retries_are_bounded():
    with FakeTriton(Fail("[UNAVAILABLE] full")) as server, TridentClient(server.url, retry=QUICK) as client:
        with pytest.raises(Overloaded, match="full"):
            client.generate("Hi", stream=False)
        assert len(server.generations) == 1 + QUICK.retries


def test_retry_after_is_honoured():
    script = [Fail("[UNAVAILABLE] full; retry after 0.4 s"), Answer()]
    with FakeTriton(*script) as server, TridentClient(server.url, retry=QUICK) as client:
        start = time.monotonic()
        client.generate("Hi", stream=False)
    assert 0.4 <= time.monotonic() - start < 2


def test_nothing_is_retried_once_a_token_has_arrived():
    script = [Fail("[UNAVAILABLE] full", tokens=("a",)), Answer()]
    with FakeTriton(*script) as server, TridentClient(server.url, retry=QUICK) as client:
        chunks = client.generate("Hi")
        assert next(chunks).text == "a"
        with pytest.raises(Overloaded):
            next(chunks)
        assert len(server.generations) == 1


def test_a_stream_that_breaks_off_is_an_error():
    with FakeTriton(Break(("Hel",))) as server, TridentClient(server.url) as client:
        chunks = client.generate("Hi")
        assert next(chunks).text == "Hel"
        with pytest.raises(EngineFailed, match="ended before"):
            next(chunks)


def test_other_grpc_statuses_keep_their_meaning():
    refusal = Refuse(grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape")
    with FakeTriton(refusal) as server, TridentClient(server.url) as client:
        chunks = client.generate("Hi")
        with pytest.raises(BadRequest, match="unexpected shape"):
            next(chunks)


def test_no_server_is_unavailable_and_names_the_address():
    with TridentClient("127.0.0.1:1", retry=RetryPolicy(retries=0)) as client:
        with pytest.raises(Overloaded, match=r"no connection to the server at 127\.0\.0\.1:1"):
            list(client.generate("Hi"))
        assert not client.is_ready()


@pytest.mark.parametrize("failure", [Fail("[INTERNAL] broken"), Refuse(), Break(), Hang()])
def test_a_kept_error_keeps_no_call_alive(failure: Fail | Refuse | Break | Hang):
    def living_calls() -> int:
        return sum(isinstance(thing, grpc.Call) and isinstance(thing, Iterator) for thing in gc.get_objects())

    with FakeTriton(failure) as server, TridentClient(server.url, retry=RetryPolicy(retries=0)) as client:
        gc.collect()
        gc.disable()
        try:
            before = living_calls()
            with pytest.raises(TridentError) as caught:
                client.generate("Hi", stream=False, timeout=0.5)
            assert caught.value.code
            assert living_calls() == before
        finally:
            gc.enable()


def test_a_timeout_ends_the_request_on_both_sides():
    with FakeTriton(Hang(("a",))) as server, TridentClient(server.url) as client:
        with pytest.raises(TimedOut):
            list(client.generate("Hi", timeout=0.3))
        assert server.generations[0].cancelled.wait(1)


def test_a_timeout_leaves_no_room_for_a_long_wait():
    with FakeTriton(Fail("[UNAVAILABLE] full; retry after 20 s")) as server, TridentClient(server.url) as client:
        start = time.monotonic()
        with pytest.raises(TimedOut):
            client.generate("Hi", stream=False, timeout=1.0)
        assert time.monotonic() - start < 1.0


def test_admin_commands_return_their_result():
    with FakeTriton() as server, TridentClient(server.url) as client:
        assert client.stats() == {"running_requests": 1}
        assert client.health() == {"ready": True}
        with pytest.raises(BadRequest, match="command: 'load'"):
            client.admin("load", name="a")
        assert server.commands[-1] == ("load", {"name": "a"})


def test_a_server_that_took_all_the_time_is_not_ready(monkeypatch: pytest.MonkeyPatch):
    left = iter([5.0, 0.0])
    monkeypatch.setattr(Deadline, "remaining", lambda self: next(left))
    with FakeTriton() as server, TridentClient(server.url) as client:
        assert not client.is_ready()


def test_readiness_asks_the_engine_where_it_can():
    with FakeTriton() as server, TridentClient(server.url) as client:
        assert client.is_ready()
        server.results["health"] = {"ready": False}
        assert not client.is_ready()
        server.results.pop("health")  # refused, as without the admin token
        assert client.is_ready()
        server.has_admin = False
        assert client.is_ready()
        assert not TridentClient(server.url, model="nope").is_ready()
