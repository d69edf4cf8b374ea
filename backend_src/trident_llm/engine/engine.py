"""EngineCore: requests in, token deltas out, one ``step`` at a time. Knows token ids, neither text nor sockets.

Not thread-safe: one thread adds, aborts and steps, so changes take effect between steps only.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import EngineConfig
from ..errors import BadRequest, Overloaded, TridentError
from ..protocol import Delta, FinishReason, Submit, Welcome
from ..quantization.live_text import LiveText
from . import runners
from .admission import Admission
from .background import Background
from .block_events import AllocateCallback, BlockEvents, BlockTotals, EvictCallback, FreeCallback, FreeReason
from .deltas import error_delta, token_delta
from .jobs import Jobs
from .loading import BuiltDecoder, LoadedModel, load_model
from .model_runner import SampledToken, StepResult
from .paired_blocks import PairedBlocks
from .queue_limit import QueueLimit
from .requantize import Journal, Requantizer
from .request_metrics import RequestMetrics
from .scheduler import Scheduler, SchedulerOutput
from .sequence import Sequence
from .statistics import memory, statistics

logger = logging.getLogger(__name__)


_READ_WAIT = 0.001
"""Seconds to leave to the threads that read adapters or make weights when nothing can be computed before they have."""


@dataclass(frozen=True)
class _InFlight:
    output: SchedulerOutput
    result: StepResult


class EngineCore:
    """Loads the model of ``config`` and serves it. Raises TridentError when it cannot be loaded.

    With ``lookahead`` (default: on a GPU) a step is launched before the tokens of the one before are known, so that the
    device never waits for the host. A stop is then found one step late, and that step's token is dropped.

    ``journal`` is told of other weights, and ``kept_digest`` is what it was told of these; see ``load_model``.

    ``on_allocate``, ``on_free`` and ``on_evict`` are called with block ids, (request id, sample index) and a reason of
    ``block_events``, at the end of ``step`` and ``abort``.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        progress: Callable[[str], None] | None = None,
        lookahead: bool | None = None,
        adapter_folder: Path | None = None,
        journal: Journal | None = None,
        kept_digest: str = "",
        on_allocate: AllocateCallback | None = None,
        on_free: FreeCallback | None = None,
        on_evict: EvictCallback | None = None,
    ) -> None:
        self.config = config
        self.model: LoadedModel = load_model(
            config, progress or (lambda text: None), adapter_folder, kept_digest=kept_digest
        )
        self.adapters = self.model.adapters
        self._events = BlockEvents()
        self.block_totals = BlockTotals(self._events)
        self._events.subscribe(on_allocate=on_allocate, on_free=on_free, on_evict=on_evict)
        self.runner = runners.make_runner(self.model, config, progress or (lambda text: None))
        self.blocks = PairedBlocks(
            self.model.kv_cache.num_blocks,
            config.block_size,
            prefix_caching=config.prefix_caching,
            events=self._events,
            host_tier=runners.make_host_tier(self.model, config, self.runner.transfer_costs),
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            sliding_window=self.model.config.sliding_window,
            slots=self.adapters.slots if self.adapters else None,
        )
        self._queue_limit = QueueLimit(lambda: self.config, self.scheduler)
        requantizer = Requantizer(
            config, self.model, self.runner, self.scheduler, is_idle=lambda: self._in_flight is None,
            journal=journal, on_changed=self._serves_now,
        )  # fmt: skip
        self._background = Background(lambda: self.config, self.model, requantizer)
        self._admission = Admission(self.model, config, self.blocks)
        self._requests: dict[str, dict[int, Sequence]] = {}
        self._eos_ids = frozenset(self.model.config.eos_token_ids)
        self._lookahead = runners.runs_on_gpu(self.model.device) if lookahead is None else lookahead
        self._in_flight: _InFlight | None = None
        self.on_launch: Callable[[Iterable[str]], None] = lambda request_ids: None
        """Called with the requests of each step before it is launched, and ``on_complete`` when that step has ended."""
        self.on_complete: Callable[[], None] = lambda: None
        self.counters = {"prompt_tokens_total": 0, "output_tokens_total": 0, "requests_total": 0, "steps_total": 0}
        self.step_seconds = 0.0
        self.request_metrics = RequestMetrics()
        if self.adapters:
            self.adapters.follow_names(self.request_metrics.adapters.keep)
        parts = [f"{name} {num_bytes / 2**20:,.0f} MiB" for name, num_bytes in memory(self).items()]
        logger.info("memory on %s: %s", self.model.device, ", ".join(parts).replace("_bytes", ""))

    def welcome(self, epoch: str) -> Welcome:
        """What doors need to know of this engine."""
        return Welcome(
            epoch=epoch,
            model=self.model.name,
            tokenizer_folder=str(self.model.tokenizer_folder),
            max_model_len=self.model.max_model_len,
            vocab_size=self.model.config.vocab_size,
            eos_token_ids=sorted(self._eos_ids),
            max_num_seqs=self.config.max_num_seqs,
            max_queue_size=self.config.max_queue_size,
            max_queue_wait=self.config.max_queue_wait,
            limits=self.config.limits,
            log_format=self.config.log_format,
            log_level=self.config.log_level,
            otlp_endpoint=self.config.otlp_endpoint,
        )

    def add(self, submit: Submit) -> None:
        """Queue a request. Raises BadRequest when it can never run, Overloaded when the queue is full."""
        if submit.request_id in self._requests:
            raise BadRequest(f"request_id: {submit.request_id!r} is in use")
        if not any(start.output_ids for start in submit.samples):  # one that is submitted again had its place before
            self._queue_limit.check(len(submit.samples))
        sequences = self._admission.sequences(submit)
        blend = sequences[0].blend
        usages = self.request_metrics.adapters.of(blend.spec) if blend else ()
        for seq in sequences:
            seq.usages = usages
        self._requests[submit.request_id] = {seq.sample_index: seq for seq in sequences}
        fresh = [seq for seq in sequences if not seq.num_output_tokens]
        if fresh:
            fresh[0].forks = fresh[1:]
            self.scheduler.add(fresh[0])
        for seq in sequences:
            if seq.num_output_tokens:
                self.scheduler.add(seq)
        self.counters["requests_total"] += 1
        if len(fresh) == len(sequences):
            self.request_metrics.added(len(sequences), usages)

    def abort(self, request_id: str, sample_index: int | None = None) -> None:
        """Drop a request, or one sample of it, and free its blocks. Unknown names are ignored."""
        for index, seq in list(self._requests.get(request_id, {}).items()):
            if sample_index in (None, index):
                self.scheduler.finish(seq, FreeReason.ABORTED)
                if sample_index is not None:
                    self.request_metrics.finished(seq)
                self._forget(seq)
        self._events.deliver()

    def has_work(self) -> bool:
        return bool(self._requests) or self._in_flight is not None

    def run_command(self, command: str, arguments: Mapping[str, Any]) -> Future[dict[str, Any]]:
        """Begin one of ``commands``; ``poll`` and ``step`` bring its end."""
        return self._background.run(command, arguments)

    @property
    def is_loading(self) -> bool:
        """Whether ``poll`` will soon have something to do."""
        return self._background.is_busy

    def poll(self) -> list[Delta]:
        """Take over what other threads have finished; returns errors of requests that lost their adapters."""
        deltas: list[Delta] = []
        for adapter, error in self._background.poll():
            samples = [seq for request in self._requests.values() for seq in request.values()]
            for seq in samples:
                if adapter in seq.adapters and seq in self.scheduler.waiting:
                    self.scheduler.finish(seq, FreeReason.ABORTED)
                    deltas.append(self._end_with_error(seq, error))
        return deltas

    def step(self) -> list[Delta]:
        """Schedule and launch a step, then postprocess: the same one, or with lookahead the one before.

        Returns the tokens that became known.
        """
        deltas = self.poll() + self._expired()
        output = self.scheduler.schedule()
        self._queue_limit.scheduled()
        if output.scheduled:
            self.on_launch({item.seq.request_id for item in output.scheduled})
        began = time.perf_counter()
        if self.adapters:
            self.adapters.apply(output.slot_loads)
        self.runner.launch_host_copies(output.host_copies)
        launched = _InFlight(output, self.runner.launch(output)) if output.scheduled else None
        if launched is None and self._in_flight is None and self.is_loading:
            time.sleep(_READ_WAIT)
        finished, self._in_flight = (self._in_flight, launched) if self._lookahead else (launched, None)
        if finished is not None:
            sampled = finished.result.tokens()
            self.on_complete()
            now = time.monotonic()
            deltas += [delta for token in sampled if (delta := self._accept(token, now)) is not None]
            self.request_metrics.end_step(now, finished.output.num_tokens)
            for item in finished.output.scheduled:
                self.blocks.register(item.seq)
            self.counters["steps_total"] += 1
        seconds = time.perf_counter() - began
        self.step_seconds += seconds
        if self.blocks.host_tier:
            self.blocks.host_tier.step_seconds = seconds
        self._events.deliver()
        return deltas

    def stats(self) -> dict[str, Any]:
        """Counters and gauges, see ``statistics``."""
        return statistics(self)

    @property
    def num_unfinished(self) -> int:
        """Sequences that run or wait."""
        return sum(map(len, self._requests.values()))

    @property
    def jobs(self) -> Jobs:
        """Those that give the model other weights."""
        return self._background.jobs

    @property
    def live_text(self) -> LiveText:
        """What ``calibrate`` has collected."""
        return self._background.live_text

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, sequences and blocks agree."""
        self.scheduler.check_integrity()
        if self.adapters:
            live = [seq.adapters for request in self._requests.values() for seq in request.values()]
            self.adapters.check_integrity(live)

    def close(self) -> None:
        """End its threads."""
        self._background.close()

    @property
    def num_places(self) -> int:
        """Sequences that ``add`` would still queue."""
        return self._queue_limit.num_places

    def _accept(self, token: SampledToken, now: float) -> Delta | None:
        """Append a token of a step that ended ``now`` to its sequence; None when that has been aborted since."""
        seq = token.seq
        seq.num_pending -= 1
        if self._requests.get(seq.request_id, {}).get(seq.sample_index) is not seq:
            return None
        if seq.num_output_tokens == 0:
            self.counters["prompt_tokens_total"] += seq.num_prompt_tokens
        self.request_metrics.token(seq, now)
        seq.token_ids.append(token.token_id)
        self.counters["output_tokens_total"] += 1
        stopped = token.token_id in seq.stop_ids
        reason: FinishReason | None = "stop" if stopped else None
        if not stopped and len(seq.token_ids) >= seq.max_total_tokens:
            reason = "length"
        if reason is not None:
            self.blocks.register(seq)
            self.scheduler.finish(seq)
            self.request_metrics.finished(seq)
            self._forget(seq)
        return token_delta(token, reason, stopped=stopped)

    def _expired(self) -> list[Delta]:
        """Errors for requests that waited longer than queue_timeout."""
        if not self.config.queue_timeout:
            return []
        late = self.scheduler.expire(self.config.queue_timeout)
        error = Overloaded(f"waited longer than queue_timeout ({self.config.queue_timeout:g} s); retry after 2 s")
        return [self._end_with_error(seq, error) for seq in late]

    def _end_with_error(self, seq: Sequence, error: TridentError) -> Delta:
        """For a sequence that the scheduler has let go of."""
        self._forget(seq)
        return error_delta(seq, error)

    def _serves_now(self, config: EngineConfig, built: BuiltDecoder) -> None:
        """The weights have changed."""
        self.config = config
        self.model = dataclasses.replace(
            self.model, quantization=built.report, weights_bytes_after=self.model.decoder.num_bytes
        )

    def _forget(self, seq: Sequence) -> None:
        if seq.calibration and seq.num_output_tokens:
            self.live_text.offer(seq.token_ids)
        self.runner.forget(seq)
        if self.adapters:
            self.adapters.release(seq.adapters)
        samples = self._requests[seq.request_id]
        del samples[seq.sample_index]
        if not samples:
            del self._requests[seq.request_id]
