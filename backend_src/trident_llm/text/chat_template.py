"""Chat messages to a prompt, with the template that comes with the model, in a sandbox.

Templates see what transformers' ``apply_chat_template`` gives them. They are untrusted, and so are messages: what a
template may loop over and write is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ..errors import BadRequest, LoadFailed

MAX_MESSAGES = 4096
_MAX_LOOP_STEPS = 1_000_000
"""Steps of all ``range`` loops of one rendering together."""
_MAX_PRODUCT = 1_000_000
"""Items in a repeated string or list, bits in a product or power."""
_SHAPE = 'give a JSON list of {"role": ..., "content": ...}'


class ChatTemplate:
    """A compiled template. ``where`` names its file in errors. Raises ``LoadFailed`` when it does not compile."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        self._special_tokens = dict(special_tokens)
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise LoadFailed(f"{where}: the chat template does not compile: {error}") from None

    def render(self, messages: Sequence[dict[str, Any]], *, max_chars: int) -> str:
        """The prompt, open for the assistant's answer. Raises ``BadRequest`` with the template's own reason when
        it refuses the messages, and when it would write more than ``max_chars`` characters."""
        values = {
            **self._special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            "range": _BoundedRange(),
        }
        pieces, size = [], 0
        try:
            for piece in self._template.generate(**values):
                pieces.append(piece)
                size += len(piece)
                if size > max_chars:
                    break
        except Exception as error:  # whatever the template's own code runs into
            reason = str(error)[:200] or type(error).__name__
            raise BadRequest(f"messages: the model's chat template refuses them: {reason}") from None
        if size > max_chars:
            raise BadRequest(f"messages: more than {max_chars} characters once rendered; send fewer")
        return "".join(pieces)


def parse_messages(raw: str | Sequence[Any]) -> list[dict[str, Any]]:
    """Checked messages, from JSON text or from a list. ``role`` and ``content`` are strings; a content of OpenAI's
    text parts becomes their texts, line by line; other keys are left to the template.

    Raises ``BadRequest`` with the position of what is wrong.
    """
    messages = raw
    if isinstance(raw, str):
        try:
            messages = json.loads(raw)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno} column {error.colno}"
            raise BadRequest(f"messages: no JSON at {where}: {error.msg}; {_SHAPE}") from None
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"messages: no JSON ({str(error)[:80]}); {_SHAPE}") from None
    if not isinstance(messages, (list, tuple)) or not messages:
        found = "an empty list" if isinstance(messages, (list, tuple)) else type(messages).__name__
        raise BadRequest(f"messages: found {found}; {_SHAPE}")
    if len(messages) > MAX_MESSAGES:
        raise BadRequest(f"messages: {len(messages)} messages; give at most {MAX_MESSAGES}")
    return [_checked(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _checked(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRequest(f"{where}: found {type(message).__name__}; {_SHAPE}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise BadRequest(f"{where}.role: missing or no string; give system, user or assistant")
    if isinstance(content, (list, tuple)):
        texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        if len(texts) < len(content):
            raise BadRequest(f'{where}.content: a part is no text; give {{"type": "text", "text": ...}} parts')
        content = "\n".join(texts)
    if not isinstance(content, str):
        raise BadRequest(f"{where}.content: missing or no string; give a string or a list of text parts")
    return {**message, "content": content}


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with products and powers bounded."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _result_size(operator, left, right) > _MAX_PRODUCT:
            raise jinja2.exceptions.SecurityError(f"a result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _result_size(operator: str, left: Any, right: Any) -> int:
    """Items of a repeated sequence, or bits of an integer product or power; 0 for anything else."""
    for items, times in ((left, right), (right, left)):
        if isinstance(items, (str, bytes, list, tuple)) and isinstance(times, int):
            return len(items) * times
    if not (isinstance(left, int) and isinstance(right, int)):
        return 0
    return left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()


class _BoundedRange:
    """``range`` whose loops take at most ``_MAX_LOOP_STEPS`` steps in all."""

    def __init__(self) -> None:
        self._left = _MAX_LOOP_STEPS

    def __call__(self, *args: int) -> range:
        result = range(*args)
        self._left -= len(result)
        if self._left < 0:
            raise OverflowError(f"its loops take more than {_MAX_LOOP_STEPS} steps")
        return result


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}``, which marks the assistant's words for training: here, its body alone."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's own escaping of HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
