"""One client request from text to text: prompt ids, samples, and the text of each so far.

Shared by the server's doors and the in-process library. It makes ``Submit`` and ``Abort`` messages and consumes
``Delta`` messages; it knows neither sockets nor the server. Not thread-safe: callers hold a lock of their own.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping

from .errors import BadRequest, TridentError, parse_error
from .options import RequestOptions
from .output import Output, PositionLogprobs, TokenLogprob, logprobs_json
from .protocol import Abort, Delta, FinishReason, SampleStart, SamplingParams, Submit, TokenLogprobs, Welcome
from .text import StopAutomaton, StopMatcher, Tokenizer, parse_messages

__all__ = ["Generation", "Output", "PositionLogprobs", "TokenLogprob", "decode_prompt", "logprobs_json"]


def decode_prompt(data: bytes, option: str = "text_input") -> str:
    """Text of client bytes. Raises ``BadRequest`` naming ``option`` when they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = data[error.start : error.start + 4].hex(" ")
        raise BadRequest(f"{option}: not valid UTF-8 at byte {error.start} ({bad}); send UTF-8 text") from None


class Generation:
    """One request and its ``options.n`` samples.

    ``prompt`` is the text to continue; it is empty when ``options.messages`` is set, and then becomes the
    rendered chat template. Raises ``BadRequest`` when there is no prompt, when it is over
    ``limits.max_prompt_bytes`` (checked before tokenizing), or when its tokens leave no room for output in
    ``max_model_len``. ``max_tokens`` is cut to the room that is left (as vLLM does); unset, it is that room.

    Use: send ``submit()``; for each delta of ``request_id`` send what ``apply`` returns, and when
    ``needs_resubmit`` is set then, or the engine was restarted, send ``submit()`` again; read with ``take``.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str,
        options: RequestOptions,
        tokenizer: Tokenizer,
        welcome: Welcome,
        *,
        client_id: str = "",
        trace_context: Mapping[str, str] | None = None,
    ) -> None:
        """``client_id``: what the client calls the request, for the log. ``trace_context``: headers of the trace that
        it is part of, when there is one and spans are wanted."""
        self.client_id = client_id
        self.trace_context = trace_context
        self.requested_at = time.monotonic()
        self.started_at = 0.0
        """When the engine began with it; as all times on the monotonic clock, and 0 before."""
        self.first_token_at = 0.0
        self.request_id = request_id
        """The name under which it was last submitted: deltas under another name are stale."""
        self.options = options
        self.prompt = _prompt_text(prompt, options, tokenizer, welcome.limits.max_prompt_bytes)
        self.prompt_ids = tokenizer.encode(self.prompt, add_special_tokens=options.messages is None)
        self.params = _sampling_params(options, len(self.prompt_ids), welcome.max_model_len)
        self.num_cached_tokens = 0
        self.error: TridentError | None = None
        """Why the request failed. Set once; the samples then have finish_reason "error"."""
        self.needs_resubmit = False
        """Tokens were lost on the way: call ``submit`` and send what it returns."""
        self._adapter = options.adapter
        self._xlora = options.xlora
        self._base_id = request_id
        self._num_submits = 0
        automaton = StopAutomaton(options.stop)
        self.samples = [Sample(index, self, tokenizer, automaton) for index in range(options.n)]

    @property
    def was_submitted(self) -> bool:
        """Whether it has been with an engine before."""
        return self._num_submits > 0

    @property
    def finished(self) -> bool:
        """All samples have ended. What they produced may still be waiting for ``take``."""
        return all(sample.finish_reason is not None for sample in self.samples)

    def submit(self) -> Submit:
        """The message that starts this request, or that continues its unfinished samples where they stand.

        Each call after the first gives the request a new ``request_id`` (and clears ``needs_resubmit``), so that
        deltas of the submission before are told apart: key tables by ``submit().request_id``. A submission that
        continues yields the same tokens as an undisturbed one. Not to be called when ``finished``.
        """
        self.request_id = self._base_id if self._num_submits == 0 else f"{self._base_id}.{self._num_submits}"
        self._num_submits += 1
        self.needs_resubmit = False
        starts = [SampleStart(index=s.index, output_ids=list(s.token_ids)) for s in self._running()]
        return Submit(
            request_id=self.request_id,
            prompt_ids=self.prompt_ids,
            params=self.params,
            samples=starts,
            priority=self.options.request_priority,
            user=self.options.user,
            cache_salt=self.options.cache_salt,
            adapter=self._adapter,
            xlora=self._xlora,
            xlora_top_k=self.options.xlora_top_k,
            xlora_temperature=self.options.xlora_temperature,
            return_scalings=self.options.return_scalings,
            return_layer_scalings=self.options.return_layer_scalings,
            requested_at=self.requested_at,
            client_id=self.client_id,
            calibration=self.options.calibration,
        )

    def apply(self, delta: Delta) -> list[Abort]:
        """Consume new tokens of one sample; returns messages to send to the engine.

        Stale deltas and tokens that came before are dropped. A sample that meets a stop string ends here, and
        its ``Abort`` is returned. A gap (lost tokens) sets ``needs_resubmit`` and returns an ``Abort`` of the
        whole submission. An error delta ends all samples and sets ``error``.
        """
        if delta.request_id != self.request_id or self.needs_resubmit or self.finished:
            return []
        if delta.finish_reason == "error":
            return self.fail(parse_error(delta.error))
        sample = self.samples[delta.sample_index]
        if sample.finish_reason is not None or delta.offset + len(delta.token_ids) < len(sample.token_ids):
            return []
        if delta.offset > len(sample.token_ids):
            self.needs_resubmit = True
            return [Abort(request_id=self.request_id)]
        self.num_cached_tokens = self.num_cached_tokens or delta.num_cached_tokens
        if delta.offset == 0 and not sample.token_ids:
            # What it began with it goes on with, whatever is loaded in the meantime.
            self._adapter = delta.adapter
            self._xlora = None if delta.adapter else False
            self.started_at = self.started_at or delta.started_at
            self.first_token_at = self.first_token_at or time.monotonic()
        sample.append(delta)
        if sample.finish_reason is not None and delta.finish_reason is None:
            return [Abort(request_id=self.request_id, sample_index=sample.index)]
        return []

    def take(self, sample_index: int) -> Output | None:
        """Everything since the last ``take`` of that sample; None when no text came and it did not finish.

        Text is held back while it is half a character or may become a stop string; its tokens come with the next
        output all the same. After the output with a ``finish_reason`` the answer is always None.
        """
        return self.samples[sample_index].take()

    def full_output(self, sample_index: int) -> Output:
        """Everything that sample has produced, whatever was taken before: the answer of a request that does not
        stream, once ``finished``."""
        return self.samples[sample_index].output(since_token=0, since_piece=0)

    def cancel(self) -> list[Abort]:
        """End all unfinished samples with finish_reason "cancelled"; returns messages to send to the engine."""
        return self._end("cancelled")

    def fail(self, error: TridentError) -> list[Abort]:
        """End all unfinished samples with ``error``; returns messages to send to the engine."""
        if not self.finished:
            self.error = error
        return self._end("error")

    def _running(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.finish_reason is None]

    def _end(self, reason: FinishReason) -> list[Abort]:
        running = self._running()
        for sample in running:
            sample.finish(reason)
        return [Abort(request_id=self.request_id)] if running and self._num_submits else []


class Sample:
    """One continuation of the prompt: its tokens, the text that may be shown, and how much of it was taken."""

    def __init__(self, index: int, generation: Generation, tokenizer: Tokenizer, automaton: StopAutomaton) -> None:
        self.index = index
        self.token_ids: list[int] = []
        """All output tokens that count: up to the one that completed a stop string."""
        self.finish_reason: FinishReason | None = None
        self._generation = generation
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(after=generation.prompt_ids)
        self._stops = StopMatcher(automaton)
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._cumulative_logprob = 0.0
        self._scaling_sums: dict[str, float] = {}
        self._scalings: list[dict[str, list[float]]] = []
        """Of each token, with a mix and where they are wanted."""
        self._num_taken_tokens = 0
        self._num_taken_pieces = 0
        self._finish_taken = False

    def append(self, delta: Delta) -> None:
        """Take in the tokens of ``delta`` that are new. ``delta.offset`` is at most ``len(token_ids)``."""
        num_known = len(self.token_ids) - delta.offset
        min_tokens = self._generation.params.min_tokens
        for position in range(num_known, len(delta.token_ids)):
            self.token_ids.append(delta.token_ids[position])
            if delta.logprobs is not None:
                self._logprobs.append(delta.logprobs[position])
                self._cumulative_logprob += delta.logprobs[position].logprob
            self._add_scalings(delta.scalings)
            if delta.stopped_by_token and position == len(delta.token_ids) - 1:
                break
            text = self._detokenizer.push(delta.token_ids[position])
            self._show(self._stops.push(text, active=len(self.token_ids) > min_tokens))
            if self._stops.stopped:
                self.finish_reason = "stop"
                return
        if delta.finish_reason is not None:
            self.finish(delta.finish_reason)

    def finish(self, reason: FinishReason) -> None:
        """End here: show what was held back (half a character becomes U+FFFD)."""
        active = len(self.token_ids) > self._generation.params.min_tokens
        self._show(self._stops.push(self._detokenizer.finish(), active=active))
        if self._stops.stopped:
            reason = "stop"
        self._show(self._stops.finish())
        self.finish_reason = reason

    def take(self) -> Output | None:
        if self._finish_taken or (self.finish_reason is None and len(self._pieces) == self._num_taken_pieces):
            return None
        output = self.output(self._num_taken_tokens, self._num_taken_pieces)
        self._num_taken_tokens = len(self.token_ids)
        self._num_taken_pieces = len(self._pieces)
        self._finish_taken = self.finish_reason is not None
        return output

    def output(self, since_token: int, since_piece: int) -> Output:
        options = self._generation.options
        scored = self._generation.params.logprobs is not None
        return Output(
            sample_index=self.index,
            text="".join(self._pieces[since_piece:]),
            token_ids=self.token_ids[since_token:],
            finish_reason=self.finish_reason,
            cumulative_logprob=self._cumulative_logprob if scored else None,
            logprobs=None if options.logprobs is None else [self._named(row) for row in self._logprobs[since_token:]],
            num_input_tokens=len(self._generation.prompt_ids),
            num_output_tokens=len(self.token_ids),
            num_cached_tokens=self._generation.num_cached_tokens,
            scalings={name: total / len(self._scalings) for name, total in self._scaling_sums.items()} or None,
            layer_scalings=self._scalings[since_token:] if options.return_layer_scalings and self._scalings else None,
        )

    def _add_scalings(self, scalings: dict[str, list[float]] | None) -> None:
        if scalings is not None:
            self._scalings.append(scalings)
            for name, values in scalings.items():
                self._scaling_sums[name] = self._scaling_sums.get(name, 0.0) + sum(values) / len(values)

    def _show(self, text: str) -> None:
        if text:
            self._pieces.append(text)

    def _named(self, row: TokenLogprobs) -> PositionLogprobs:
        """``row`` with the text of its tokens. The i-th of ``top`` has rank i + 1."""
        name = self._tokenizer.token_text
        return PositionLogprobs(
            chosen=TokenLogprob(row.token_id, row.logprob, row.rank, name(row.token_id)),
            top=tuple(
                TokenLogprob(top.token_id, top.logprob, rank, name(top.token_id))
                for rank, top in enumerate(row.top, start=1)
            ),
        )


def _prompt_text(prompt: str, options: RequestOptions, tokenizer: Tokenizer, max_bytes: int) -> str:
    if options.messages is None:
        _check_size("text_input", prompt, max_bytes)
        return prompt
    if prompt:
        raise BadRequest("text_input: must be empty when messages is given; put the text into a message")
    if isinstance(options.messages, str):
        _check_size("messages", options.messages, max_bytes)
    return tokenizer.render_chat(parse_messages(options.messages), max_chars=4 * max_bytes)


def _check_size(option: str, text: str, max_bytes: int) -> None:
    """Raise when ``text`` is longer than ``max_bytes`` in UTF-8, or has no UTF-8 form."""
    try:
        size = len(text) if len(text) > max_bytes else len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise BadRequest(f"{option}: unpaired surrogate at character {error.start}; send UTF-8 text") from None
    if size > max_bytes:
        raise BadRequest(f"{option}: at least {size} bytes; at most {max_bytes} (max_prompt_bytes) are allowed")


def _sampling_params(options: RequestOptions, num_prompt_tokens: int, max_model_len: int) -> SamplingParams:
    option = "text_input" if options.messages is None else "messages"
    if num_prompt_tokens == 0:
        raise BadRequest(f"{option}: empty; give at least one character of text")
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise BadRequest(
            f"{option}: {num_prompt_tokens} tokens; at most {max_model_len - 1} are allowed, "
            f"because prompt and output together have at most {max_model_len} (max_model_len)"
        )
    seed = secrets.randbits(63) if options.seed is None else options.seed
    return options.sampling_params(seed=seed, room=room)
