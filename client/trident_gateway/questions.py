"""A request of OpenAI's API, read and checked: what is asked, of which model, and how the answer is to look."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trident_client.wire import Message

from .affinity import key_of
from .errors import ApiError, bad_value, unsupported
from .options import flag, generation_options, includes_usage, renamed_options

MAX_PROMPTS = 64
_BEGINNING_CHARS = 512
"""Of a prompt, or of a conversation's first question, for the choice of a server."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """``prompts`` has one entry for chat; each has ``n`` answers."""

    chat: bool
    model: str
    prompts: Sequence[str | Sequence[Message]]
    n: int
    stream: bool
    include_usage: bool
    options: Mapping[str, Any]
    renamed: Mapping[str, str]

    def key(self, prompt: str | Sequence[Message]) -> bytes:
        """By which a server is chosen for one of the prompts: the same for all requests of a conversation."""
        return key_of(self.model, str(self.options.get("cache_salt", "")), _beginning(prompt))


def read_question(data: bytes, *, chat: bool) -> Question:
    """The body of a request. Raises ``ApiError``."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise bad_value("model", "give the name of a model")
    stream = flag(body, "stream")
    include_usage = includes_usage(body, stream)
    return Question(
        chat=chat,
        model=model,
        prompts=[_messages(body.get("messages"))] if chat else _prompts(body.get("prompt")),
        n=_count(body.get("n")),
        stream=stream,
        include_usage=include_usage,
        options=generation_options(body, chat=chat, counts=include_usage or not stream),
        renamed=renamed_options(body),
    )


def _count(value: Any) -> int:
    if value is None:
        return 1
    if not isinstance(value, int) or isinstance(value, bool):
        raise bad_value("n", f"{value!r:.200} is not allowed; give an integer of at least 1")
    return value


def _prompts(value: Any) -> list[str]:
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not prompts:
        raise bad_value("prompt", "give a string or a list of strings")
    if any(isinstance(item, (int, list)) for item in prompts):
        raise unsupported("prompt", "token ids are not supported; give text")
    if not all(isinstance(item, str) for item in prompts):
        raise bad_value("prompt", "give a string or a list of strings")
    if len(prompts) > MAX_PROMPTS:
        raise bad_value("prompt", f"{len(prompts)} prompts are not allowed; give at most {MAX_PROMPTS}")
    return prompts


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise bad_value("messages", 'give a list of {"role": ..., "content": ...}')
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(message: dict[str, Any], name: str) -> Message:
    """The message with its content as one string; parts of text are put together."""
    for field in ("tool_calls", "function_call", "tool_call_id", "audio"):
        if message.get(field):
            raise unsupported(f"{name}.{field}", "this server does not support it; leave it out")
    role, content = message.get("role"), message.get("content")
    if role in ("tool", "function"):
        raise unsupported(f"{name}.role", f"{role!r} is not supported; give system, user or assistant")
    if role not in ("system", "developer", "user", "assistant"):
        raise bad_value(f"{name}.role", f"{role!r:.200} is not allowed; give system, user or assistant")
    if isinstance(content, list):
        content = "".join(_text_of(part, f"{name}.content") for part in content)
    if not isinstance(content, str):
        raise bad_value(f"{name}.content", "give a string, or a list of parts of type text")
    return {"role": "system" if role == "developer" else role, "content": content}


def _text_of(part: Any, name: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(kind, str) and kind != "text":
        raise unsupported(name, f"parts of type {kind[:40]!r} are not supported; give text")
    raise bad_value(name, 'give parts of the form {"type": "text", "text": ...}')


def _beginning(prompt: str | Sequence[Message]) -> str:
    """What is said before the first question, all of it, and how that question begins. A long document at its
    beginning brings the questions about it together."""
    if isinstance(prompt, str):
        return prompt[:_BEGINNING_CHARS]
    opening: list[tuple[str, str]] = []
    for message in prompt:
        role, content = message["role"], message["content"]
        if role == "assistant":
            break
        if role == "user":
            opening.append((role, content[:_BEGINNING_CHARS]))
            break
        opening.append((role, content))
    return json.dumps(opening)
