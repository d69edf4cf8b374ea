"""Engine: the engine as a library, with text in and text out, in this process and without a server.

A thread of its own steps the core; callers submit and read from any thread or event loop. The same options give the
same results as through the server.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from .config import EngineConfig
from .engine.engine import EngineCore
from .errors import EngineFailed, TridentError
from .generation import Generation, Output
from .options import RequestOptions
from .text import Tokenizer

_END = None
"""Ends the inbox."""


class OutputStream(Iterator[Output]):
    """The outputs of one request. Closing it, or dropping it before its end, cancels the request."""

    _generation: Generation | None = None

    def __init__(self, engine: Engine, prompt: str, options: dict[str, Any], stream: bool) -> None:
        self._engine = engine
        self._stream = stream
        self._wakeup = threading.Event()
        self._ready: collections.deque[Output] = collections.deque()
        self._generation = engine._start(prompt, options, self._wakeup.set)

    def __next__(self) -> Output:
        while not self._ready:
            if self._generation is None:
                raise StopIteration
            self._wakeup.wait()
            self._wakeup.clear()
            try:
                outputs, finished = self._engine._take(self._generation, self._stream)
            except TridentError:
                self.close()
                raise
            self._ready.extend(outputs)
            if finished:
                self.close()
        return self._ready.popleft()

    def close(self) -> None:
        """Cancel what is left. Safe to call twice."""
        generation, self._generation = self._generation, None
        if generation is not None:
            self._engine._stop(generation)

    def __del__(self) -> None:
        self.close()


class Engine:
    """Loads ``config.model`` and generates. Use as a context manager, or call ``close``.

    Raises BadRequest, NotFound or LoadFailed when the model cannot be loaded. ``progress`` receives lines about loading.
    """

    def __init__(self, config: EngineConfig, *, progress: Callable[[str], None] | None = None) -> None:
        self.config = config
        self._core = EngineCore(config, progress=progress)
        self._welcome = self._core.welcome(epoch="library")
        self.tokenizer = Tokenizer(Path(self._welcome.tokenizer_folder))
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._generations: dict[str, tuple[Generation, Callable[[], None]]] = {}
        self._failure: TridentError | None = None
        self._names = itertools.count()
        self._thread = threading.Thread(target=self._run, name="trident-engine", daemon=True)
        self._thread.start()

    def generate(self, prompt: str = "", *, stream: bool = True, **options: Any) -> OutputStream:
        """Iterate over the outputs of one request as they come; with ``stream=False`` one output a sample at the end.

        ``options`` are the request options of the server's doors, ``messages`` included. Leaving the iterator early
        cancels the request. Raises BadRequest for a bad option, and what the engine answers while iterating.
        """
        return OutputStream(self, prompt, options, stream)

    async def generate_async(self, prompt: str = "", *, stream: bool = True, **options: Any) -> AsyncIterator[Output]:
        """``generate`` for asyncio; cancelling the task cancels the request."""
        loop, wakeup = asyncio.get_running_loop(), asyncio.Event()
        generation = self._start(prompt, options, lambda: loop.call_soon_threadsafe(wakeup.set))
        try:
            while True:
                await wakeup.wait()
                wakeup.clear()
                outputs, finished = self._take(generation, stream)
                for output in outputs:
                    yield output
                if finished:
                    return
        finally:
            self._stop(generation)

    def stats(self) -> dict[str, Any]:
        """Counters and gauges of the engine, as ``llm_admin`` gives them."""
        answer: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._post(lambda: answer.put(self._core.stats()))
        return answer.get()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every KV block is accounted for."""
        answer: queue.SimpleQueue[AssertionError | None] = queue.SimpleQueue()

        def check() -> None:
            try:
                self._core.check_integrity()
                answer.put(None)
            except AssertionError as error:
                answer.put(error)

        self._post(check)
        if (error := answer.get()) is not None:
            raise error

    def close(self) -> None:
        """Cancel what runs and end the engine's thread. Safe to call twice."""
        self._inbox.put(_END)
        self._thread.join()
        self._fail(EngineFailed("the engine was closed"))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start(self, prompt: str, options: dict[str, Any], notify: Callable[[], None]) -> Generation:
        welcome = self._welcome
        parsed = RequestOptions.parse(
            options,
            limits=welcome.limits,
            max_model_len=welcome.max_model_len,
            vocab_size=welcome.vocab_size,
        )
        generation = Generation(f"library-{next(self._names)}", prompt, parsed, self.tokenizer, welcome)
        submit = generation.submit()
        with self._lock:
            self._generations[submit.request_id] = generation, notify

        def add() -> None:
            try:
                self._core.add(submit)
            except TridentError as error:
                with self._lock:
                    generation.fail(error)
                notify()

        self._post(add)
        return generation

    def _take(self, generation: Generation, stream: bool) -> tuple[list[Output], bool]:
        """New outputs, and whether they are the last. Raises the request's error once everything before is out."""
        with self._lock:
            if generation.error is not None:
                raise generation.error
            finished = generation.finished
            indices = range(len(generation.samples))
            if not stream:
                return ([generation.full_output(i) for i in indices] if finished else []), finished
            return [output for i in indices if (output := generation.take(i)) is not None], finished

    def _stop(self, generation: Generation) -> None:
        """Forget a generation; if it is not finished, free what it holds in the engine."""
        with self._lock:
            self._generations.pop(generation.request_id, None)
            aborts = generation.cancel()
        for abort in aborts:
            self._inbox.put(lambda abort=abort: self._core.abort(abort.request_id, abort.sample_index))  # type: ignore[misc]

    def _post(self, action: Callable[[], None]) -> None:
        """Have the engine's thread do something between two steps."""
        if self._failure is not None:
            raise self._failure
        self._inbox.put(action)

    def _run(self) -> None:
        try:
            while self._drain():
                if self._core.has_work():
                    self._deliver()
        except Exception as error:
            self._fail(EngineFailed(f"the engine broke: {type(error).__name__}: {error}"))

    def _drain(self) -> bool:
        """Do what callers asked for, waiting for it when there is nothing else to do. False at the end."""
        block = not self._core.has_work()
        while True:
            try:
                action = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if action is _END:
                return False
            action()
            block = False

    def _deliver(self) -> None:
        notified: dict[str, Callable[[], None]] = {}
        for delta in self._core.step():
            with self._lock:
                generation, notify = self._generations.get(delta.request_id, (None, None))
                if generation is None or notify is None:
                    continue
                for abort in generation.apply(delta):
                    self._core.abort(abort.request_id, abort.sample_index)
            notified[delta.request_id] = notify
        for notify in notified.values():
            notify()

    def _fail(self, error: TridentError) -> None:
        self._failure = error
        with self._lock:
            generations = list(self._generations.values())
            for generation, _ in generations:
                generation.fail(error)
        for _, notify in generations:
            notify()
