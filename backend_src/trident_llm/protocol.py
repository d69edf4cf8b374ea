"""The messages between a door (text side) and the engine (token side): the only types both share.

They travel as msgpack over a private Unix socket. A request is named by a door-unique string; each of its ``n``
samples is one sequence in the engine, named by (request_id, sample_index).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens. Complete and validated: the engine trusts it.

    ``seed`` is always set (the door draws one when the client gives none): randomness is a function of
    (seed, sample_index, position) alone, so a sequence that is moved or restarted continues unchanged.
    """

    seed: int
    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 means all of the vocabulary."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    """Besides the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: not computed. k >= 0: the chosen token's log-probability and those of the k most likely."""

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


class SampleStart(msgspec.Struct, frozen=True, kw_only=True):
    """Where a sample begins: empty for a fresh one, the tokens generated so far for a resubmitted one."""

    index: int
    output_ids: list[int] = []


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """A request: ``prompt_ids`` (at least one id) and its samples, all with the same parameters."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    samples: list[SampleStart] = msgspec.field(default_factory=lambda: [SampleStart(index=0)])
    priority: int = 0
    """Lower runs first and is preempted last."""
    user: str = ""
    """Users share the engine fairly when there is not room for all."""
    cache_salt: str = ""
    """Prefix-cache blocks are shared only between requests with equal salts."""
    adapter: str = ""
    """A name or a blend of several, see ``adapters.spec``; resubmitted with the generations it began with."""
    xlora: bool | None = None
    """Take the X-LoRA mix; None: if there is one and ``adapter`` is empty."""
    xlora_top_k: int | None = None
    """0: all adapters; None: as settings and mix say."""
    xlora_temperature: float | None = None
    return_scalings: bool = False
    return_layer_scalings: bool = False
    requested_at: float = 0.0
    """When it reached its door, on the monotonic clock, which a resubmission does not change; 0: now."""
    client_id: str = ""
    """What the client calls it, for the log alone."""
    calibration: bool = False
    """Its tokens may be kept in memory and calibrated on."""


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Stop a request that nobody wants (``sample_index`` None), or one sample, whose text is complete. Unknown names
    are ignored."""

    request_id: str
    sample_index: int | None = None


class Command(msgspec.Struct, frozen=True, kw_only=True, tag="command"):
    """An administrative call: ``stats``, ``config``, ``health``, or one of ``commands``."""

    command_id: int
    command: str
    arguments: dict[str, Any] = {}


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """A door's first message on a connection; the engine answers with ``Welcome``."""

    door: str


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
    """End the engine process: take no new requests, and give those that run this many seconds to finish."""

    drain_timeout: float = 0.0


ToEngine = Hello | Submit | Abort | Command | Shutdown


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities at one position, of the model's own distribution (before temperature,
    penalties and bias). ``rank`` is 1 for the most likely token."""

    token_id: int
    logprob: float
    rank: int
    top: list[TopLogprob]


class Delta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """New tokens of one sequence. ``offset`` counts the output tokens before this delta.

    There is one per token: what is at its default does not travel.
    """

    request_id: str
    sample_index: int
    offset: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stopped_by_token: bool = False
    """The last token is an end-of-sequence or stop token: counted as output, not part of the text."""
    error: str = ""
    """With finish_reason "error": the text, starting with its code."""
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    adapter: str = ""
    """With offset 0: the request's adapters or mix, with generations."""
    started_at: float = 0.0
    """With offset 0: when the engine first computed on the sequence, on the monotonic clock."""
    scalings: dict[str, list[float]] | None = None
    """Of the token's adapters, averaged over all modules, or over those of each layer; None unless they are wanted and
    there is a mix."""


class StepDeltas(msgspec.Struct, frozen=True, kw_only=True, tag="deltas"):
    """All new tokens for one door. ``epoch`` changes when the engine is restarted."""

    epoch: str
    deltas: list[Delta]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Hard caps on request options; each is a setting of the same name."""

    max_n: int
    max_stop_strings: int
    max_logprobs: int
    max_prompt_bytes: int


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """What a door must know of the engine and its model."""

    epoch: str
    model: str
    tokenizer_folder: str
    """Local folder with tokenizer.json and tokenizer_config.json (chat template, special tokens)."""
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    max_num_seqs: int
    max_queue_size: int
    max_queue_wait: float = 0.0
    limits: Limits
    log_format: str = "text"
    log_level: str = "info"
    otlp_endpoint: str = ""
    """The settings of these names, which hold for doors too."""


class CommandReply(msgspec.Struct, frozen=True, kw_only=True, tag="reply"):
    command_id: int
    result: dict[str, Any] = {}
    error: str = ""


ToDoor = Welcome | StepDeltas | CommandReply
