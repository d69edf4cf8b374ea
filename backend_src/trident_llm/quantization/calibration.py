"""The text that layers are calibrated on: read, checked and cut into samples of token ids before any weight is read.

Text comes as a plain file, or as JSONL with {"text": ...} or {"messages": [...]} a line, chats through the model's own
template; lines may name their "source". Knows nothing of methods.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadRequest
from ..text import Tokenizer

SHIPPED = Path(__file__).parent / "data" / "calibration.jsonl"
_KEY = "isq_calibration"
_SHAPE = '{"text": "..."} or {"messages": [{"role": "...", "content": "..."}, ...]}'
_CHAT_CHARS = 1 << 22
_MAX_FILE_BYTES = 256 << 20
_HELD_OUT = 4
"""For so many samples to calibrate on, one of other text is kept where a loss is to be measured."""


@dataclass(frozen=True)
class CalibrationSettings:
    """The settings ``isq_calibration*``."""

    file: str = ""
    """Empty: the text that ships with the project."""
    num_samples: int = 64
    length: int = 512


@dataclass(frozen=True)
class Samples:
    """Token ids [N, length] int64 on the CPU."""

    calibration: Tensor
    held_out: Tensor
    """Never calibrated on. Empty unless asked for."""
    digest: str
    """Of all of them."""


def load_samples(
    settings: CalibrationSettings, tokenizer: Tokenizer, *, vocab_size: int, max_length: int, held_out: bool
) -> Samples:
    """Samples evenly spread over the text, which all of its documents make up one after another.

    What is held out comes from sources of its own where the text has enough of them: more of what was calibrated on
    loses less than other text. Raises ``BadRequest`` for a file that is missing, empty, binary or of another form, or
    too short for one sample.
    """
    path = Path(settings.file).expanduser() if settings.file else SHIPPED
    documents = [
        (source, [token for token in document if token < vocab_size])
        for source, document in _documents(path, tokenizer)
    ]
    length = min(settings.length, max_length)
    if held_out:
        ids, held_ids = _by_source(documents)
        if min(len(ids), len(held_ids)) >= length:
            return _sample(ids, held_ids, settings, length)
    whole = [token for _, document in documents for token in document]
    return cut_samples(whole, settings, f"{_KEY}: {str(path)!r}", max_length=max_length, held_out=held_out)


def cut_samples(
    ids: Sequence[int], settings: CalibrationSettings, what: str, *, max_length: int, held_out: bool
) -> Samples:
    """Samples evenly spread over ``ids``, of whose end a part is held out.

    Raises ``BadRequest`` that begins with ``what`` when there are too few.
    """
    length = min(settings.length, max_length)
    if len(ids) // length < (2 if held_out else 1):
        raise BadRequest(
            f"{what} has {len(ids)} tokens; at least {length * (2 if held_out else 1)} are needed "
            f"(isq_calibration_length {length}{', one sample to calibrate on and one to measure' if held_out else ''})"
        )
    end = len(ids) - (max(len(ids) // (_HELD_OUT + 1), length) if held_out else 0)
    return _sample(ids[:end], ids[end:], settings, length)


def _by_source(documents: Sequence[tuple[str, list[int]]]) -> tuple[list[int], list[int]]:
    """Token ids to calibrate on, and those of every fifth source, the second first."""
    kept = set(list(dict.fromkeys(source for source, _ in documents))[1 :: _HELD_OUT + 1])
    parts: tuple[list[int], list[int]] = [], []
    for source, ids in documents:
        parts[source in kept].extend(ids)
    return parts


def _sample(ids: Sequence[int], held_ids: Sequence[int], settings: CalibrationSettings, length: int) -> Samples:
    calibration = _spread(ids, settings.num_samples, length)
    held_out = _spread(held_ids, settings.num_samples // _HELD_OUT or 1, length)
    content = (len(calibration).to_bytes(8, "little"), calibration.numpy().tobytes(), held_out.numpy().tobytes())
    return Samples(calibration, held_out, hashlib.sha256(b"".join(content)).hexdigest())


def _spread(ids: Sequence[int], wanted: int, length: int) -> Tensor:
    """At most ``wanted`` samples that do not overlap, [N, length] int64."""
    count = min(wanted, len(ids) // length)
    starts = [index * (len(ids) - length) // max(count - 1, 1) for index in range(count)]
    return torch.tensor([list(ids[start : start + length]) for start in starts], dtype=torch.int64).view(-1, length)


def _documents(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    """Source and token ids of each. A line of JSONL that names no source is one."""
    text = _read(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield _record(f"line {number}", f"{_KEY}: {str(path)!r}, line {number}", line, tokenizer)
    else:
        yield "", tokenizer.encode(text)


def _read(path: Path) -> str:
    try:
        # Devices and pipes have no end, or block.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise BadRequest(f"{_KEY}: {str(path)!r} is no file; give a text or JSONL file")
        if path.stat().st_size > _MAX_FILE_BYTES:
            limit = f"at most {_MAX_FILE_BYTES >> 20} MiB"
            raise BadRequest(f"{_KEY}: {str(path)!r} has {path.stat().st_size} bytes; give a file of {limit}")
        content = path.read_bytes()
    except OSError as error:
        problem = f"{str(path)!r} cannot be read ({error.strerror})"
        raise BadRequest(f"{_KEY}: {problem}; give a text or JSONL file") from None
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise BadRequest(f"{_KEY}: {str(path)!r} is binary; give UTF-8 text, or JSONL with {_SHAPE} a line")
    if not text.strip():
        raise BadRequest(f"{_KEY}: {str(path)!r} is empty; give UTF-8 text, or JSONL with {_SHAPE} a line")
    return text


def _record(name: str, where: str, line: str, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """name: the source of a record that names none."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise BadRequest(f"{where}: no JSON; give {_SHAPE}") from None
    source = record.get("source", name) if isinstance(record, dict) else name
    if not isinstance(source, str):
        raise BadRequest(f"{where}: source is {json.dumps(source)[:40]}; give a string, or leave it out")
    return source, _tokens(where, record, tokenizer)


def _tokens(where: str, record: Any, tokenizer: Tokenizer) -> list[int]:
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return tokenizer.encode(record["text"])
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise BadRequest(f"{where}: neither text nor chat; give {_SHAPE}")
    if tokenizer.chat_template is None:
        return tokenizer.encode("\n\n".join(message["content"] for message in messages))
    try:
        return tokenizer.encode(tokenizer.render_chat(messages, max_chars=_CHAT_CHARS), add_special_tokens=False)
    except BadRequest as error:
        raise BadRequest(f"{where}: {error.message}") from None


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
