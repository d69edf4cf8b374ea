"""Engine in this process: iterators, asyncio, cancellation and failure, with a tiny random model."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.fakes.tiny_models import write_tiny_llama
from trident_llm import Engine, EngineConfig
from trident_llm.errors import BadRequest, EngineFailed

OPTIONS = {"max_tokens": 30, "ignore_eos": True, "seed": 5}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    config = EngineConfig(model=str(folder), dtype="fp32", device="cpu", num_threads=1, max_num_blocks=64)
    with Engine(config) as engine:
        yield engine


def wait_until_idle(engine):
    deadline = time.monotonic() + 5
    while engine.stats()["running_requests"] or engine.stats()["waiting_requests"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    engine.check_integrity()


def text_of(outputs):
    return "".join(output.text for output in outputs)


def test_streamed_whole_and_asyncio_texts_are_equal(engine):
    streamed = list(engine.generate("hello", **OPTIONS))
    assert len(streamed) > 5 and streamed[-1].finish_reason == "length"
    (whole,) = engine.generate("hello", stream=False, **OPTIONS)
    assert whole.text == text_of(streamed) and whole.num_output_tokens == 30

    async def collect():
        return [output async for output in engine.generate_async("hello", **OPTIONS)]

    assert text_of(asyncio.run(collect())) == whole.text


def test_several_samples(engine):
    outputs = list(engine.generate("hello", stream=False, n=3, **OPTIONS))
    assert [output.sample_index for output in outputs] == [0, 1, 2]
    assert len({output.text for output in outputs}) == 3


def test_leaving_early_cancels(engine):
    stream = engine.generate("hello", max_tokens=400, ignore_eos=True)
    next(stream)
    stream.close()
    assert list(stream) == []
    wait_until_idle(engine)
    for _ in engine.generate("hello", max_tokens=400, ignore_eos=True):
        break
    wait_until_idle(engine)


def test_a_stream_nobody_reads_is_cancelled_when_it_is_dropped(engine):
    engine.generate("hello", max_tokens=400, ignore_eos=True)
    wait_until_idle(engine)


def test_cancelling_a_task_cancels_its_request(engine):
    async def scenario():
        started = asyncio.Event()

        async def read():
            async for _ in engine.generate_async("hello", max_tokens=400, ignore_eos=True):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    wait_until_idle(engine)


def test_bad_options_are_errors_at_once(engine):
    with pytest.raises(BadRequest, match="max_tokens"):
        engine.generate("hello", max_tokens=0)
    with pytest.raises(BadRequest, match="empty"):
        engine.generate("")
    with pytest.raises(BadRequest, match="temperatur"):
        engine.generate("hello", temperatur=1)


def test_a_request_the_engine_refuses_raises_while_iterating(engine):
    engine._core.config = EngineConfig(**{**engine.config.__dict__, "max_queue_size": 0, "max_num_seqs": 1})
    try:
        streams = [engine.generate("hello", max_tokens=100, ignore_eos=True) for _ in range(4)]
        outcomes = []
        for stream in streams:
            try:
                outcomes.append(text_of(stream))
            except Exception as error:
                outcomes.append(str(error))
        assert sum("max_queue_size" in outcome for outcome in outcomes) >= 1
        assert sum("max_queue_size" not in outcome for outcome in outcomes) >= 1
    finally:
        engine._core.config = engine.config


def test_a_broken_or_closed_engine_says_so(tmp_path):
    folder = write_tiny_llama(tmp_path)
    engine = Engine(EngineConfig(model=str(folder), dtype="fp32", device="cpu", num_threads=1, max_num_blocks=16))

    def broken_step():
        raise RuntimeError("out of order")

    engine._core.step = broken_step
    with pytest.raises(EngineFailed, match="RuntimeError: out of order"):
        list(engine.generate("hello"))
    with pytest.raises(EngineFailed, match="RuntimeError: out of order"):
        engine.stats()
    engine.close()
    engine.close()
    with pytest.raises(EngineFailed):
        list(engine.generate("hello"))


def test_callbacks_follow_a_request_and_may_ask_for_statistics(tmp_path):
    told = []

    def note(kind):
        return lambda block_ids, sequence_id, reason: told.append((kind, block_ids, sequence_id, str(reason)))

    def ask(block_ids, sequence_id, reason):
        told.append(("used", engine.stats()["kv_blocks_used"], sequence_id, str(reason)))

    folder = write_tiny_llama(tmp_path)
    config = EngineConfig(model=str(folder), dtype="fp32", device="cpu", num_threads=1, max_num_blocks=8)
    with Engine(config, on_allocate=note("allocate"), on_free=ask, on_evict=note("evict")) as engine:
        stream = engine.generate("hello", max_tokens=20, ignore_eos=True)
        assert len(list(stream)) > 5
        wait_until_idle(engine)
        name = stream.request_id, 0
        assert told == [
            ("allocate", (0,), name, "prompt"), ("allocate", (1,), name, "growth"), ("used", 0, name, "finished"),
        ]  # fmt: skip
        for seed in range(8):
            list(engine.generate(f"{seed} hello, good evening", max_tokens=8, ignore_eos=True))
        assert {kind for kind, *_ in told} == {"allocate", "used", "evict"}
