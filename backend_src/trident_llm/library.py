"""Engine: the engine as a library, with text in and text out, in this process and without a server.

A thread of its own steps the core; callers submit and read from any thread or event loop. The same options give the
same results as through the server.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import itertools
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import EngineConfig
from .engine.block_events import AllocateCallback, EvictCallback, FreeCallback
from .engine.engine import EngineCore
from .errors import EngineFailed, TridentError, parse_error
from .generation import Generation, Output
from .options import RequestOptions
from .protocol import Delta
from .text import Tokenizer

_COMMAND_POLL_SECONDS = 0.005
_END = None
"""Ends the inbox."""


@dataclass(frozen=True)
class _Action:
    """Something for the engine's thread to do, and where its result goes."""

    function: Callable[[], Any]
    result: Future[Any]

    def run(self) -> None:
        try:
            self.result.set_result(self.function())
        except (TridentError, AssertionError) as error:
            self.result.set_exception(error)


class OutputStream(Iterator[Output]):
    """The outputs of one request. Closing it, or dropping it before its end, cancels the request."""

    _generation: Generation | None = None

    def __init__(self, engine: Engine, prompt: str, options: dict[str, Any], stream: bool) -> None:
        self._engine = engine
        self._stream = stream
        self._wakeup = threading.Event()
        self._ready: collections.deque[Output] = collections.deque()
        self._generation = engine._start(prompt, options, self._wakeup.set)
        self.request_id = self._generation.request_id

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

    Raises BadRequest, NotFound or LoadFailed when the model cannot be loaded. ``progress`` gets lines about loading.

    ``on_allocate``, ``on_free`` and ``on_evict`` follow the KV cache: each is called with a tuple of block ids, the
    sequence as (request id, sample index), and a reason of ``trident_llm.engine.block_events``, on the engine's thread
    between two steps. They hold the engine up, so they should be quick; of the engine they may call ``stats`` alone.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        progress: Callable[[str], None] | None = None,
        on_allocate: AllocateCallback | None = None,
        on_free: FreeCallback | None = None,
        on_evict: EvictCallback | None = None,
    ) -> None:
        self.config = config
        self._core = EngineCore(config, progress=progress, on_allocate=on_allocate, on_free=on_free, on_evict=on_evict)
        self._welcome = self._core.welcome(epoch="library")
        self.tokenizer = Tokenizer(Path(self._welcome.tokenizer_folder))
        self._inbox: queue.SimpleQueue[_Action | None] = queue.SimpleQueue()
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
        generation = self._start(prompt, options, lambda: _wake(loop, wakeup))
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
        if threading.current_thread() is self._thread:  # from a callback: waiting for itself would never end
            return self._core.stats()
        return self._post(self._core.stats).result()

    def load_adapter(self, name: str, path: str, *, pinned: bool = False) -> dict[str, Any]:
        """Load a LoRA adapter, or put it in another's place: requests from now on get it. Returns what it is.

        ``path`` is a folder below the setting ``adapter_root``. Raises BadRequest, NotFound or LoadFailed, and then
        nothing has changed.
        """
        return self._run_command("load_adapter", {"name": name, "path": path, "pinned": pinned})

    def load_xlora(self, path: str, name: str = "xlora") -> dict[str, Any]:
        """Load an X-LoRA mix and its members, or put it in another's place; the one named xlora is the default."""
        return self._run_command("load_xlora", {"path": path, "name": name})

    def unload_adapter(self, name: str) -> dict[str, Any]:
        """Take an adapter's name away; requests that run with it keep it to their end. Raises NotFound."""
        return self._run_command("unload_adapter", {"name": name})

    def list_adapters(self) -> dict[str, Any]:
        """All loaded adapters."""
        return self._run_command("list_adapters", {})

    def requantize(self, **settings: Any) -> dict[str, Any]:
        """Change the settings ``isq_*`` under running requests, which finish on the old weights; waits for the end.

        Returns the job. Raises BadRequest for settings that do not fit, and when the new weights cannot be served what
        the reason is: the old ones are then served on.
        """
        job = self._run_command("requantize", {"settings": settings})
        while job["state"] == "running":
            self._post(self._poll).result()
            time.sleep(_COMMAND_POLL_SECONDS)
            job = self._run_command("job", {"id": job["id"]})
        if job["error"]:
            raise parse_error(job["error"])
        return job

    def check_integrity(self) -> None:
        """Raise AssertionError unless every KV block is accounted for."""
        self._post(self._core.check_integrity).result()

    def close(self) -> None:
        """Cancel what runs and end the engine's thread. Safe to call twice."""
        self._inbox.put(_END)
        self._thread.join()
        self._core.close()

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

        def refused(result: Future[Any]) -> None:
            if isinstance(error := result.exception(), TridentError):
                with self._lock:
                    generation.fail(error)
                notify()

        self._post(functools.partial(self._core.add, submit)).add_done_callback(refused)
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
            self._post(functools.partial(self._core.abort, abort.request_id, abort.sample_index))

    def _run_command(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        result = self._post(functools.partial(self._core.run_command, command, arguments)).result()
        while not result.done():
            # The engine's thread takes over what has been read; when it is idle somebody must tell it to look.
            self._post(self._poll).result()
            time.sleep(_COMMAND_POLL_SECONDS)
        answer: dict[str, Any] = result.result()
        return answer

    def _poll(self) -> None:
        self._route(self._core.poll())

    def _post(self, function: Callable[[], Any]) -> Future[Any]:
        """Have the engine's thread do something between two steps."""
        action = _Action(function, Future())
        with self._lock:
            if self._failure is None:
                self._inbox.put(action)
            else:
                action.result.set_exception(self._failure)
        return action.result

    def _run(self) -> None:
        failure = EngineFailed("the engine was closed")
        try:
            while self._drain():
                if self._core.has_work():
                    self._deliver()
        except Exception as error:
            failure = EngineFailed(f"the engine broke: {type(error).__name__}: {error}")
        self._fail(failure)

    def _drain(self) -> bool:
        """Do what callers asked for, waiting for it when there is nothing else to do. False at the end."""
        block = not self._core.has_work()
        while True:
            try:
                action = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if action is None:
                return False
            action.run()
            block = False

    def _deliver(self) -> None:
        self._route(self._core.step())

    def _route(self, deltas: list[Delta]) -> None:
        notified: dict[str, Callable[[], None]] = {}
        for delta in deltas:
            with self._lock:
                generation, notify = self._generations.get(delta.request_id, (None, None))
                if generation is None or notify is None:
                    continue
                aborts = generation.apply(delta)
            for abort in aborts:
                self._core.abort(abort.request_id, abort.sample_index)
            notified[delta.request_id] = notify
        for notify in notified.values():
            notify()

    def _fail(self, error: TridentError) -> None:
        with self._lock:
            self._failure = error
            generations = list(self._generations.values())
            for generation, _ in generations:
                generation.fail(error)
        while not self._inbox.empty():
            if (action := self._inbox.get()) is not None:
                action.result.set_exception(error)
        for _, notify in generations:
            notify()


def _wake(loop: asyncio.AbstractEventLoop, wakeup: asyncio.Event) -> None:
    """Set an event of another thread's loop; a loop that has been closed needs no waking."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(wakeup.set)
