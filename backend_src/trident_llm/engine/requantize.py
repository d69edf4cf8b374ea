"""Requantizer: gives a serving engine other weights of the same model, between two steps.

Requests that have begun finish on the old weights while all others wait. Whatever fails, the old weights are served
again. It advances with the engine's steps; weights are made by a thread of their own.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import psutil
import torch

from ..config import EngineConfig
from ..errors import Cancelled, EngineFailed, LoadFailed, Overloaded, known_error
from ..quantization.loading import Quantization
from ..quantization.workspace import bytes_to_build
from ..run_directory import Requantized
from .jobs import Job, Jobs
from .loading import BuiltDecoder, DecoderSource, LoadedModel
from .model_runner import ModelRunner
from .scheduler import Scheduler

T = TypeVar("T")

_CLOSE_SECONDS = 3.0
"""How long the end of the engine waits for the thread, which looks up once a layer."""


class Journal(Protocol):
    """Tells an engine that takes this one's place what to load."""

    def write_requantized(self, requantized: Requantized) -> None: ...


@dataclass(frozen=True)
class Wanted:
    """What a command asks for. ``live_tokens``: to calibrate on, in place of the text of the settings."""

    command: str
    config: EngineConfig
    live_tokens: Sequence[int] | None = None


class _CannotGoBack(EngineFailed):
    """Neither the new weights can be served nor the old ones: a new process must load them."""


class Requantizer:
    """``on_changed`` is called with the settings in force from then on and the model, described anew."""

    def __init__(
        self,
        config: EngineConfig,
        model: LoadedModel,
        runner: ModelRunner | Any,
        scheduler: Scheduler,
        *,
        is_idle: Callable[[], bool],
        journal: Journal | None,
        on_changed: Callable[[EngineConfig, BuiltDecoder], None],
    ) -> None:
        """``is_idle``: whether no step is in flight. ``runner``: of the CPU or the GPU."""
        self._config = config
        self._model = model
        self._source: DecoderSource = model.source
        self._digest = model.samples_digest
        self._runner = runner
        self._scheduler = scheduler
        self._is_idle = is_idle
        self._journal = journal
        self._on_changed = on_changed
        self.jobs = Jobs()
        self._work: Generator[None, None, None] | None = None
        self._thread: threading.Thread | None = None
        self._closing = False

    @property
    def is_busy(self) -> bool:
        return self._work is not None

    def begin(self, wanted: Wanted, on_done: Callable[[], None] = lambda: None) -> Future[dict[str, Any]]:
        """The future describes the job once everything about the settings has been checked; until then errors are its.

        ``on_done`` is called when the new weights are served. Raises ``BadRequest`` or ``Overloaded``.
        """
        if self._work is not None:
            raise Overloaded(f"{wanted.command}: the weights are being changed already; try again when that job ends")
        quantization = self._source.quantization(wanted.config)
        reply: Future[dict[str, Any]] = Future()
        self._work = self._run(wanted, quantization, reply, on_done)
        return reply

    def poll(self) -> None:
        """Advance; between two steps."""
        if self._work is not None and next(self._work, self) is self:
            self._work = None

    def close(self) -> None:
        """End the thread as soon as it looks up."""
        self._closing = True
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    def _run(
        self, wanted: Wanted, quantization: Quantization, reply: Future[dict[str, Any]], on_done: Callable[[], None]
    ) -> Generator[None, None, None]:
        try:
            yield from self._in_thread(functools.partial(self._read_text, wanted, quantization))
        except Exception as error:
            reply.set_exception(known_error(error, LoadFailed))
            return
        job = self.jobs.begin(wanted.command)
        reply.set_result(job.describe())
        try:
            built = yield from self._replace(job, wanted.config, quantization)
        except _CannotGoBack:
            raise
        except Exception as error:
            job.fail(error)
        else:
            self._config, self._digest = wanted.config, quantization.samples_digest
            self._on_changed(wanted.config, built)
            job.finish(built.report.summary() if built.report else "all weights are in full precision")
            on_done()
        finally:
            self._scheduler.hold.end()
            if self._model.adapters is not None:
                self._model.adapters.resume()

    def _read_text(self, wanted: Wanted, quantization: Quantization) -> None:
        if wanted.live_tokens is None:
            self._source.read_calibration(quantization, self._look_up)
        else:
            quantization.calibrate_on(wanted.live_tokens, "calibrate: what was collected", self._source.max_model_len)

    def _replace(
        self, job: Job, config: EngineConfig, quantization: Quantization
    ) -> Generator[None, None, BuiltDecoder]:
        built = None
        if (yield from self._in_thread(lambda: self._has_room_for_both(config))):
            with contextlib.suppress(torch.OutOfMemoryError):
                built = yield from self._build(job, quantization)
        yield from self._drain(job)
        if built is None:
            return (yield from self._rebuild(job, config, quantization))
        decoder = self._model.decoder
        decoder.exchange_weights(built.decoder)
        try:
            yield from self._settle(job)
            self._record(config, quantization.samples_digest)
        except Exception:
            decoder.exchange_weights(built.decoder)
            yield from self._go_back(job, lambda: self._settle(job))
            raise
        built.decoder.release_weights()
        _free_memory()
        return built

    def _rebuild(
        self, job: Job, config: EngineConfig, quantization: Quantization
    ) -> Generator[None, None, BuiltDecoder]:
        """Without room for both: the old weights go first, and are made again if the new ones fail."""
        try:
            built = yield from self._build_in_place(job, quantization)
            self._record(config, quantization.samples_digest)
        except Exception:
            yield from self._go_back(job, lambda: self._restore(job))
            raise
        return built

    def _restore(self, job: Job) -> Generator[None, None, None]:
        quantization = self._source.quantization(self._config)
        reading = functools.partial(
            self._source.read_calibration, quantization, self._look_up, kept_digest=self._digest
        )
        yield from self._in_thread(reading)
        yield from self._build_in_place(job, quantization)

    def _build_in_place(self, job: Job, quantization: Quantization) -> Generator[None, None, BuiltDecoder]:
        self._runner.release_graphs()
        self._model.decoder.release_weights()
        _free_memory()
        built = yield from self._build(job, quantization)
        self._model.decoder.exchange_weights(built.decoder)
        yield from self._settle(job)
        return built

    def _go_back(self, job: Job, restore: Callable[[], Iterator[None]]) -> Generator[None, None, None]:
        job.tell("failed; going back to the weights of before")
        try:
            yield from restore()
        except Exception as error:
            raise _CannotGoBack(f"the weights of before cannot be served again: {error}") from error

    def _build(self, job: Job, quantization: Quantization) -> Generator[None, None, BuiltDecoder]:
        def tell(text: str) -> None:
            self._look_up(text)
            job.tell(text)

        return (yield from self._in_thread(lambda: self._source.build(quantization, tell)))

    def _drain(self, job: Job) -> Generator[None, None, None]:
        """Let running requests finish, and the thread that reads adapters."""
        self._scheduler.start_hold()
        while not (self._scheduler.is_drained and self._is_idle()):
            job.tell(f"waiting for {len(self._scheduler.running)} running sequences")
            yield
        if self._model.adapters is not None:
            self._model.adapters.pause()
            while not self._model.adapters.is_paused:
                yield
            # What was read on the old weights is taken over before the next step, and forgotten with them.
            yield

    def _settle(self, job: Job) -> Generator[None, None, None]:
        """After the decoder's weights have changed: drop all that was computed with those before."""
        self._runner.release_graphs()
        _free_memory()
        if self._model.adapters is not None:
            self._model.adapters.forget_weights()
        blocks = self._scheduler.blocks
        blocks.flush(self._scheduler.waiting)
        yield from self._runner.capture(job.tell)
        if blocks.host_tier is not None and self._runner.transfer_costs is not None:
            blocks.host_tier.set_costs(self._runner.transfer_costs)

    def _record(self, config: EngineConfig, samples_digest: str) -> None:
        """From now on an engine that takes this one's place loads the new weights: no token of theirs is out yet."""
        if self._journal is not None:
            self._journal.write_requantized(Requantized(settings=isq_settings(config), samples_digest=samples_digest))

    def _has_room_for_both(self, config: EngineConfig) -> bool:
        source = self._source
        needed = bytes_to_build(config, source.model_config, source.dtype, source.device)
        # A step may take as much anew on the new weights, and what graphs have reserved serves nobody else.
        kept = self._model.step_bytes + self._runner.graph_bytes
        return needed + kept <= free_bytes(source.device)

    def _in_thread(self, function: Callable[[], T]) -> Generator[None, None, T]:
        """The result of ``function``, which a thread runs beside the steps."""
        result: Future[T] = Future()

        def run() -> None:
            try:
                with _own_stream(self._source.device):
                    result.set_result(function())
            except BaseException as error:
                # What was half made may be large, and its memory is wanted for the way back.
                traceback.clear_frames(error.__traceback__)
                result.set_exception(error)

        self._thread = threading.Thread(target=run, name="requantize", daemon=True)
        self._thread.start()
        while not result.done():
            yield
        self._thread.join()
        return result.result()

    def _look_up(self, _text: str) -> None:
        if self._closing:
            raise Cancelled("the engine is being ended")


def isq_settings(config: EngineConfig) -> dict[str, str]:
    """The settings of quantization, as strings."""
    return {name: text for name, text in config.to_parameters().items() if name.startswith("isq_")}


def free_bytes(device: torch.device) -> int:
    """Memory that new weights may take."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Work on a GPU beside the steps, all of it done at the end."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
        stream.synchronize()
