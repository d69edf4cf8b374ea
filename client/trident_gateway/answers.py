"""Answers in OpenAI's form: chunks of a stream (server-sent events) and whole ones, as bytes. Sends nothing."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from trident_client import Chunk, Completion

from .logprobs import chat_logprobs, completion_logprobs, num_chars
from .questions import Question

DONE = b"data: [DONE]\n\n"
_FINISH = {"stop": "stop", "length": "length"}
"""A sample that brings no error can also be cancelled, by the option timeout: its text is cut, as with length."""

_ANY_TEXT = "\0"
_encode = json.JSONEncoder().encode


class AnswerWriter:
    """Writes one answer. ``chunk`` is the hot path: of an event that is text alone only the text is written anew."""

    def __init__(self, question: Question) -> None:
        self._question = question
        prefix, kind = ("chatcmpl-", "chat.completion") if question.chat else ("cmpl-", "text_completion")
        self._kind = kind
        self._head = {"id": prefix + secrets.token_hex(12), "created": int(time.time()), "model": question.model}
        streamed = {**self._head, "object": "chat.completion.chunk" if question.chat else kind}
        self._before = "data: " + json.dumps(streamed)[:-1] + ', "choices": ['
        self._after = ('], "usage": null}' if question.include_usage else "]}") + "\n\n"
        self._end = "data: " + json.dumps(streamed)[:-1] + ', "choices": [], "usage": '
        self._around_text: dict[int, tuple[bytes, bytes]] = {}
        """Of each choice that has begun: an event before and after its text, where it has no more than that."""
        self._offsets: dict[int, int] = {}
        self._input: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._output = 0

    def chunk(self, chunk: Chunk, prompt: int = 0) -> bytes:
        """The event for a piece of the answer to the prompt at index ``prompt``; empty when there is nothing to say."""
        self._count(chunk, prompt)
        index = prompt * self._question.n + chunk.index
        reason = _FINISH.get(chunk.finish_reason, "length") if chunk.finish_reason else None
        if not (chunk.text or reason or chunk.logprobs):
            return b""
        around = self._around_text.get(index)
        if around is None:
            self._around_text[index] = self._frame(index)
        elif not (reason or chunk.logprobs):
            return around[0] + _encode(chunk.text).encode() + around[1]
        logprobs = self._logprobs(chunk.logprobs, index)
        choice = self._choice(index, chunk.text, logprobs, reason, first=around is None)
        return (self._before + _encode(choice) + self._after).encode()

    def usage_chunk(self) -> bytes:
        """The last event before the end, where ``stream_options`` asks for it; else nothing."""
        if not self._question.include_usage:
            return b""
        return (self._end + json.dumps(self._usage()) + "}\n\n").encode()

    def whole(self, completions: Sequence[Completion]) -> bytes:
        """The answer in one piece; ``completions``: one per prompt."""
        choices = []
        for prompt, completion in enumerate(completions):
            self._input[prompt] = completion.num_input_tokens or 0
            self._cached[prompt] = completion.num_cached_tokens or 0
            for number, sample in enumerate(completion.samples):
                self._output += sample.num_output_tokens or 0
                index = prompt * self._question.n + number
                text = {"message": {"role": "assistant", "content": sample.text, "refusal": None}}
                choice = {
                    "index": index,
                    **(text if self._question.chat else {"text": sample.text}),
                    "logprobs": self._logprobs(sample.logprobs, index),
                    "finish_reason": _FINISH.get(sample.finish_reason or "", "length"),
                }
                choices.append(choice)
        answer = {**self._head, "object": self._kind, "choices": choices, "usage": self._usage()}
        return json.dumps(answer).encode()

    def _choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None, *, first: bool
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text}
        if self._question.chat:
            role = {"role": "assistant"} if first else {}
            said = {"delta": {**role, "content": text} if text or first or not reason else {}}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        before, after = _encode(self._choice(index, _ANY_TEXT, None, None, first=False)).split(_encode(_ANY_TEXT))
        return (self._before + before).encode(), (after + self._after).encode()

    def _count(self, chunk: Chunk, prompt: int) -> None:
        self._output += chunk.num_output_tokens or 0
        if chunk.num_input_tokens is not None:
            self._input[prompt] = chunk.num_input_tokens
        if chunk.num_cached_tokens is not None:
            self._cached[prompt] = chunk.num_cached_tokens

    def _logprobs(self, rows: list[Any] | None, index: int) -> dict[str, Any] | None:
        if not rows:
            return None
        top = int(self._question.options["logprobs"])
        if self._question.chat:
            return chat_logprobs(rows, top)
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + num_chars(rows)
        return completion_logprobs(rows, top, offset)

    def _usage(self) -> dict[str, Any]:
        prompt = sum(self._input.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._output,
            "total_tokens": prompt + self._output,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }
