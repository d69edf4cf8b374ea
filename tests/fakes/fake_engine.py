"""An engine core with no model: text is a function of the prompt, and prompts can order it to crash or to be slow.

Run as a program it is an engine process: ``fake_engine.py [--step-time S] [--busy] --run-dir DIR --owner-pid PID``.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes.byte_tokenizer import EOS_TOKEN_ID, VOCAB_SIZE
from trident_llm.config import EngineConfig
from trident_llm.engine.adapter_usage import AdapterUsage
from trident_llm.engine.process import main
from trident_llm.engine.request_metrics import RequestMetrics
from trident_llm.errors import BadRequest, LoadFailed, Overloaded
from trident_llm.protocol import Delta, Submit, TokenLogprobs, TopLogprob, Welcome

BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096
NUM_BLOCKS = 100_000
LINGERING = 1.5
"""Seconds for which the process of a model that ends in ``does-not-load-and-lingers`` outlives its failure."""
LETTERS = b"abcdefghijklmnopqrstuvwxyz"


def expected_text(prompt: str, num_tokens: int, sample_index: int = 0) -> str:
    """What the fake engine answers to ``prompt``: words of four letters."""
    ids = list(prompt.encode())
    return bytes(next_token(ids, sample_index, position) for position in range(num_tokens)).decode()


def next_token(prompt_ids: list[int], sample_index: int, position: int) -> int:
    if position % 5 == 4:
        return ord(" ")
    return LETTERS[(sum(prompt_ids) * 7 + sample_index * 3 + position * 11) % len(LETTERS)]


@dataclass
class FakeSequence:
    """One sample of a request."""

    submit: Submit
    sample_index: int
    num_output: int
    usages: tuple[AdapterUsage, ...]

    @property
    def is_silent(self) -> bool:
        return b"<silent>" in bytes(token_id for token_id in self.submit.prompt_ids if token_id < 256)

    @property
    def num_blocks(self) -> int:
        return -(-(len(self.submit.prompt_ids) + self.num_output) // BLOCK_SIZE)


class FakeEngineCore:
    """One token per sequence and step. Adapters are names that ``load_adapter`` and ``unload_adapter`` bring and take.

    A prompt that contains ``<crash>`` breaks its first step, with ``<crash:N>`` the one after N tokens, and with
    ``<refuse>`` it breaks ``add``; ``<crash-once:FILE>`` breaks the third step unless FILE exists, and makes it, and
    ``<hang-once:FILE>`` makes that step last a minute; a prompt that contains ``<eos:N>`` ends after N tokens, one with
    ``<silent>`` gets none.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        progress: Callable[[str], None] | None = None,
        step_time: float = 0.001,
        busy: bool = False,
    ) -> None:
        """``step_time``: seconds of a step; ``busy``: they are spent computing, not sleeping."""
        if config.model.endswith("does-not-load-and-lingers"):
            threading.Thread(target=time.sleep, args=(LINGERING,)).start()
        if "does-not-load" in config.model or config.revision == "broken":
            raise LoadFailed("the fake model does not load")
        self.config = config
        self._step_time = step_time
        self._busy = busy
        self._running: dict[tuple[str, int], FakeSequence] = {}
        self.on_launch: Callable[[Iterable[str]], None] = lambda request_ids: None
        self.on_complete: Callable[[], None] = lambda: None
        self.request_metrics = RequestMetrics()
        self._adapters: dict[str, None] = {}
        self._counters = {"prompt_tokens_total": 0, "output_tokens_total": 0, "peak_running_requests": 0, "steps": 0}
        if progress is not None:
            progress("loading the fake weights")

    def welcome(self, epoch: str) -> Welcome:
        return Welcome(
            epoch=epoch,
            model="fake",
            tokenizer_folder=self.config.model,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=[EOS_TOKEN_ID],
            max_num_seqs=self.config.max_num_seqs,
            max_queue_size=self.config.max_queue_size,
            max_queue_wait=self.config.max_queue_wait,
            limits=self.config.limits,
            log_format=self.config.log_format,
            log_level=self.config.log_level,
            otlp_endpoint=self.config.otlp_endpoint,
        )

    def add(self, submit: Submit) -> None:
        if not submit.prompt_ids or len(submit.prompt_ids) >= MAX_MODEL_LEN:
            raise BadRequest(f"prompt: {len(submit.prompt_ids)} tokens do not fit max_model_len ({MAX_MODEL_LEN})")
        if b"<refuse>" in bytes(token_id for token_id in submit.prompt_ids if token_id < 256):
            raise RuntimeError("ordered to crash before the first step")
        if self.num_places <= 0:
            raise Overloaded("the queue is full; retry after 1 s")
        self._counters["prompt_tokens_total"] += len(submit.prompt_ids)
        usages = self.request_metrics.adapters.of(submit.adapter)
        self.request_metrics.added(len(submit.samples), usages)
        for sample in submit.samples:
            key = (submit.request_id, sample.index)
            self._running[key] = FakeSequence(submit, sample.index, len(sample.output_ids), usages)
        peak = max(self._counters["peak_running_requests"], len({key[0] for key in self._running}))
        self._counters["peak_running_requests"] = peak

    def abort(self, request_id: str, sample_index: int | None = None) -> None:
        for key in [key for key in self._running if key[0] == request_id and sample_index in (None, key[1])]:
            del self._running[key]

    is_loading = False

    def poll(self) -> list[Delta]:
        return []

    def close(self) -> None:
        """It has no threads."""

    def run_command(self, command: str, arguments: Mapping[str, Any]) -> Future[dict[str, Any]]:
        result: Future[dict[str, Any]] = Future()
        if command == "load_adapter":
            self._adapters[arguments["name"]] = None
        elif command == "unload_adapter":
            del self._adapters[arguments["name"]]
        self.request_metrics.adapters.keep(self._adapters)
        result.set_result({"command": command, "arguments": dict(arguments)})
        return result

    @property
    def num_places(self) -> int:
        return self.config.max_num_seqs + self.config.max_queue_size - len(self._running)

    def has_work(self) -> bool:
        return bool(self._running)

    def step(self) -> list[Delta]:
        self.on_launch({request_id for request_id, _ in self._running})
        end = time.monotonic() + self._step_time
        while self._busy and time.monotonic() < end:
            pass
        time.sleep(max(0.0, end - time.monotonic()))
        self._counters["steps"] += 1
        self._counters["output_tokens_total"] += len(self._running)
        for usage in [usage for sequence in self._running.values() for usage in sequence.usages]:
            usage.generated_tokens += 1
        self.request_metrics.end_step(time.monotonic(), len(self._running))
        deltas = [_advance(sequence) for sequence in self._running.values() if not sequence.is_silent]
        self.on_complete()
        for delta in deltas:
            if delta.finish_reason is not None:
                del self._running[delta.request_id, delta.sample_index]
        return deltas

    def stats(self) -> dict[str, Any]:
        zeros = (
            "waiting_requests",
            "kv_blocks_cached",
            "kv_blocks_allocated_total",
            "kv_blocks_freed_total",
            "kv_blocks_evicted_total",
            "prefix_cache_query_tokens_total",
            "prefix_cache_hit_tokens_total",
            "preemptions_total",
        )
        return {
            **dict.fromkeys(zeros, 0),
            **self._counters,
            "running_requests": len({key[0] for key in self._running}),
            "adapter_usage": self.request_metrics.adapters.to_dict(),
            "kv_blocks_total": NUM_BLOCKS,
            "kv_blocks_used": sum(sequence.num_blocks for sequence in self._running.values()),
        }

    def check_integrity(self) -> None:
        assert all(sequence.num_output < sequence.submit.params.max_tokens for sequence in self._running.values())


def _advance(sequence: FakeSequence) -> Delta:
    """The next token of ``sequence``, and what its prompt orders."""
    submit, position = sequence.submit, sequence.num_output
    prompt = bytes(token_id for token_id in submit.prompt_ids if token_id < 256).decode(errors="replace")
    _obey_crash_orders(prompt, position)
    token_id = next_token(submit.prompt_ids, sequence.sample_index, position)
    if "<eos:" in prompt and position == int(_argument(prompt, "eos")):
        token_id = EOS_TOKEN_ID
    sequence.num_output += 1
    stopped = token_id in (EOS_TOKEN_ID, *submit.params.stop_token_ids)
    finish = "stop" if stopped else "length" if sequence.num_output >= submit.params.max_tokens else None
    logprobs = None
    if submit.params.logprobs is not None:
        top = [TopLogprob(token_id=(token_id + k) % 256, logprob=-0.5 - k) for k in range(submit.params.logprobs)]
        logprobs = [TokenLogprobs(token_id=token_id, logprob=-0.5, rank=1, top=top)]
    return Delta(
        request_id=submit.request_id,
        sample_index=sequence.sample_index,
        offset=position,
        token_ids=[token_id],
        logprobs=logprobs,
        finish_reason=finish,
        started_at=0.0 if position else time.monotonic(),
        stopped_by_token=stopped,
    )


def _obey_crash_orders(prompt: str, position: int) -> None:
    if "<crash>" in prompt or ("<crash:" in prompt and position >= int(_argument(prompt, "crash"))):
        raise RuntimeError("ordered to crash")
    for order in ("crash-once", "hang-once"):
        if f"<{order}:" in prompt and position >= 2 and not (mark := Path(_argument(prompt, order))).exists():
            mark.touch()
            if order == "crash-once":
                raise RuntimeError("ordered to crash once")
            time.sleep(60)


def _argument(prompt: str, order: str) -> str:
    """What follows the order's name: ``<order:ARGUMENT>``."""
    return prompt.partition(f"<{order}:")[2].partition(">")[0]


def fake_main() -> int:
    """Entry point of the fake engine process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-time", type=float, default=0.001)
    parser.add_argument("--busy", action="store_true")
    own, rest = parser.parse_known_args()

    def make_core(config: EngineConfig, progress: Callable[[str], None]) -> FakeEngineCore:
        return FakeEngineCore(config, progress=progress, step_time=own.step_time, busy=own.busy)

    return main(rest, make_core)


if __name__ == "__main__":
    sys.exit(fake_main())
