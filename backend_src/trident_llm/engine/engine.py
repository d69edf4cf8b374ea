"""EngineCore: requests in, token deltas out, one ``step`` at a time. Knows token ids, neither text nor sockets.

Not thread-safe: one thread adds, aborts and steps, so changes take effect between steps only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.commands import AdapterCommands
from ..adapters.sources import AdapterSources
from ..config import EngineConfig
from ..errors import BadRequest, Overloaded, TridentError
from ..protocol import Delta, FinishReason, Submit, Welcome
from .admission import Admission
from .block_events import AllocateCallback, BlockEvents, BlockTotals, EvictCallback, FreeCallback, FreeReason
from .host_tier import HostTier, TransferCosts
from .loading import LoadedModel, load_model
from .model_runner import ModelRunner, SampledToken, StepResult
from .paired_blocks import PairedBlocks
from .scheduler import Scheduler, SchedulerOutput
from .sequence import Sequence

if TYPE_CHECKING:
    from .cuda_runner import CudaRunner


logger = logging.getLogger(__name__)


_READ_WAIT = 0.001
"""Seconds to leave to the thread that reads adapters when nothing can be computed before it has."""


@dataclass(frozen=True)
class _InFlight:
    output: SchedulerOutput
    result: StepResult


class EngineCore:
    """Loads the model of ``config`` and serves it. Raises TridentError when it cannot be loaded.

    With ``lookahead`` (default: on a GPU) a step is launched before the tokens of the one before are known, so that the
    device never waits for the host. A stop is then found one step late, and that step's token is dropped.

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
        on_allocate: AllocateCallback | None = None,
        on_free: FreeCallback | None = None,
        on_evict: EvictCallback | None = None,
    ) -> None:
        self.config = config
        self.model: LoadedModel = load_model(config, progress or (lambda text: None), adapter_folder)
        self.adapters = self.model.adapters
        self._adapter_commands = AdapterCommands(
            self.adapters, AdapterSources(config.adapter_root, config.allow_hub_adapters)
        )
        self._events = BlockEvents()
        self._block_totals = BlockTotals(self._events)
        self._events.subscribe(on_allocate=on_allocate, on_free=on_free, on_evict=on_evict)
        self.runner = _make_runner(self.model, config, progress or (lambda text: None))
        self.blocks = PairedBlocks(
            self.model.kv_cache.num_blocks,
            config.block_size,
            prefix_caching=config.prefix_caching,
            events=self._events,
            host_tier=_make_host_tier(self.model, config, self.runner.transfer_costs),
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            sliding_window=self.model.config.sliding_window,
            slots=self.adapters.slots if self.adapters else None,
        )
        self._admission = Admission(self.model, config, self.blocks)
        self._requests: dict[str, dict[int, Sequence]] = {}
        self._eos_ids = frozenset(self.model.config.eos_token_ids)
        self._lookahead = _runs_on_gpu(self.model.device) if lookahead is None else lookahead
        self._in_flight: _InFlight | None = None
        self.on_launch: Callable[[Iterable[str]], None] = lambda request_ids: None
        """Called with the requests of each step before it is launched, and ``on_complete`` when that step has ended."""
        self.on_complete: Callable[[], None] = lambda: None
        self._counters = {"prompt_tokens_total": 0, "output_tokens_total": 0, "requests_total": 0, "steps_total": 0}
        self._step_seconds = 0.0
        parts = [f"{name} {num_bytes / 2**20:,.0f} MiB" for name, num_bytes in self._memory().items()]
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
            limits=self.config.limits,
        )

    def add(self, submit: Submit) -> None:
        """Queue a request. Raises BadRequest when it can never run, Overloaded when the queue is full."""
        if submit.request_id in self._requests:
            raise BadRequest(f"request_id: {submit.request_id!r} is in use")
        self._check_queue(submit)
        sequences = self._admission.sequences(submit)
        self._requests[submit.request_id] = {seq.sample_index: seq for seq in sequences}
        fresh = [seq for seq in sequences if not seq.num_output_tokens]
        if fresh:
            fresh[0].forks = fresh[1:]
            self.scheduler.add(fresh[0])
        for seq in sequences:
            if seq.num_output_tokens:
                self.scheduler.add(seq)
        self._counters["requests_total"] += 1

    def abort(self, request_id: str, sample_index: int | None = None) -> None:
        """Drop a request, or one sample of it, and free its blocks. Unknown names are ignored."""
        for index, seq in list(self._requests.get(request_id, {}).items()):
            if sample_index in (None, index):
                self.scheduler.finish(seq, FreeReason.ABORTED)
                self._forget(seq)
        self._events.deliver()

    def has_work(self) -> bool:
        return bool(self._requests) or self._in_flight is not None

    def run_command(self, command: str, arguments: Mapping[str, Any]) -> Future[dict[str, Any]]:
        """Begin one of ``adapters.commands``; ``poll`` and ``step`` bring its end."""
        return self._adapter_commands.run(command, arguments)

    @property
    def is_loading(self) -> bool:
        """Whether ``poll`` will soon have something to do."""
        return self.adapters is not None and self.adapters.is_busy

    def poll(self) -> list[Delta]:
        """Take over what other threads have finished; returns errors of requests that lost their adapters."""
        lost = self.adapters.poll() if self.adapters else []
        deltas: list[Delta] = []
        for adapter, error in lost:
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
            deltas += [delta for token in sampled if (delta := self._accept(token)) is not None]
            for item in finished.output.scheduled:
                self.blocks.register(item.seq)
            self._counters["steps_total"] += 1
        seconds = time.perf_counter() - began
        self._step_seconds += seconds
        if self.blocks.host_tier:
            self.blocks.host_tier.step_seconds = seconds
        self._events.deliver()
        return deltas

    def stats(self) -> dict[str, Any]:
        """Counters and gauges, by the names they have as metrics without the prefix ``trident_``."""
        running, tier = len(self.scheduler.running), self.blocks.host_tier
        return {
            "running_requests": running,
            "waiting_requests": sum(len(sequences) for sequences in self._requests.values()) - running,
            "peak_running_requests": self.scheduler.peak_running,
            "kv_blocks_total": self.blocks.num_blocks,
            "kv_blocks_used": self.blocks.num_used,
            "kv_blocks_cached": self.blocks.num_cached,
            "kv_blocks_allocated_total": self._block_totals.allocated,
            "kv_blocks_freed_total": self._block_totals.freed,
            "kv_blocks_evicted_total": self._block_totals.evicted,
            "prefix_cache_query_tokens_total": self.blocks.num_query_tokens,
            "prefix_cache_hit_tokens_total": self.blocks.num_hit_tokens,
            "preemptions_total": self.scheduler.num_preemptions,
            "swapped_blocks_total": tier.num_swapped if tier else 0,
            "host_blocks_total": tier.num_blocks if tier else 0,
            "host_blocks_used": tier.num_used if tier else 0,
            "step_seconds_total": round(self._step_seconds, 6),
            **self._counters,
            **(self.adapters.stats() if self.adapters else {}),
            "memory": self._memory(),
            "quantization": self.model.quantization.to_dict() if self.model.quantization else None,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "max_model_len": self.model.max_model_len,
        }

    def _memory(self) -> dict[str, int]:
        """Bytes by use, on the model's device and, of the host tier, beside it."""
        return {
            "weights_bytes_before": self.model.weights_bytes_before,
            "weights_bytes_after": self.model.weights_bytes_after,
            "adapter_slot_bytes": self.adapters.device.num_bytes if self.adapters else 0,
            "step_bytes": self.model.step_bytes,
            "kv_cache_bytes": self.model.kv_cache.num_bytes,
            "graph_bytes": self.runner.graph_bytes,
            "host_tier_bytes": self.model.num_host_blocks * self.model.kv_cache.block_bytes,
        }

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, sequences and blocks agree."""
        self.scheduler.check_integrity()
        if self.adapters:
            live = [seq.adapters for request in self._requests.values() for seq in request.values()]
            self.adapters.check_integrity(live)

    def close(self) -> None:
        """End its threads."""
        if self.adapters:
            self.adapters.close()

    @property
    def num_places(self) -> int:
        """Sequences that ``add`` would still queue."""
        most = self.config.max_queue_size + self.config.max_num_seqs
        return max(most - len(self.scheduler.running), 1) - self.scheduler.num_unstarted

    def _check_queue(self, submit: Submit) -> None:
        if any(start.output_ids for start in submit.samples):
            return  # resubmitted: it had its place before
        num_samples, waiting = len(submit.samples), self.scheduler.num_unstarted
        most = self.config.max_queue_size + self.config.max_num_seqs
        if num_samples > most:
            raise BadRequest(f"n: {num_samples} is not allowed; at most max_queue_size + max_num_seqs ({most})")
        if waiting + num_samples > max(most - len(self.scheduler.running), 1):
            raise Overloaded(
                f"{waiting} requests are waiting (max_queue_size {self.config.max_queue_size}); retry after 2 s"
            )

    def _accept(self, token: SampledToken) -> Delta | None:
        """Append a sampled token to its sequence; None when that has been aborted since."""
        seq = token.seq
        seq.num_pending -= 1
        if self._requests.get(seq.request_id, {}).get(seq.sample_index) is not seq:
            return None
        if seq.num_output_tokens == 0:
            self._counters["prompt_tokens_total"] += seq.num_prompt_tokens
        seq.token_ids.append(token.token_id)
        self._counters["output_tokens_total"] += 1
        stopped = token.token_id in seq.stop_ids
        reason: FinishReason | None = "stop" if stopped else None
        if not stopped and len(seq.token_ids) >= seq.max_total_tokens:
            reason = "length"
        if reason is not None:
            self.blocks.register(seq)
            self.scheduler.finish(seq)
            self._forget(seq)
        return Delta(
            request_id=seq.request_id,
            sample_index=seq.sample_index,
            offset=seq.num_output_tokens - 1,
            token_ids=[token.token_id],
            logprobs=None if token.logprobs is None else [token.logprobs],
            finish_reason=reason,
            stopped_by_token=stopped,
            num_cached_tokens=seq.num_cached_tokens,
            adapter=seq.blend.spec if seq.blend and seq.num_output_tokens == 1 else "",
            scalings=_named(seq, token.scalings),
        )

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
        return Delta(
            request_id=seq.request_id,
            sample_index=seq.sample_index,
            offset=seq.num_output_tokens,
            token_ids=[],
            finish_reason="error",
            error=str(error),
        )

    def _forget(self, seq: Sequence) -> None:
        self.runner.forget(seq)
        if self.adapters:
            self.adapters.release(seq.adapters)
        samples = self._requests[seq.request_id]
        del samples[seq.sample_index]
        if not samples:
            del self._requests[seq.request_id]


def _named(seq: Sequence, scalings: list[list[float]] | None) -> dict[str, list[float]] | None:
    """By adapter."""
    if scalings is None:
        return None
    columns = zip(*scalings, strict=True)
    return {adapter.name: list(column) for adapter, column in zip(seq.adapters, columns, strict=True)}


def _make_runner(
    model: LoadedModel, config: EngineConfig, progress: Callable[[str], None]
) -> ModelRunner | CudaRunner:
    if not _runs_on_gpu(model.device):
        return ModelRunner(
            model.decoder, model.kv_cache, device=model.device, num_adapter_slots=config.num_adapter_slots
        )
    from .cuda_runner import CudaRunner

    return CudaRunner(
        model.decoder,
        model.kv_cache,
        device=model.device,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=model.max_model_len,
        num_host_blocks=model.num_host_blocks,
        num_adapter_slots=config.num_adapter_slots,
        # Steps with a mix that is loaded later run without graphs.
        captures_mixes=bool(config.xlora) and config.routing_method == "learned",
        progress=progress,
    )


def _make_host_tier(model: LoadedModel, config: EngineConfig, costs: TransferCosts | None) -> HostTier | None:
    return None if costs is None else HostTier(model.num_host_blocks, config.block_size, costs)


def _runs_on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
