"""The text that layers are calibrated on: read, checked and cut into samples of token ids before any weight is read.

Text comes as a plain file, or as JSONL with {"text": ...} or {"messages": [...]} a line, chats through the model's own
template. Knows nothing of methods.
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
"""One sample in so many is kept from calibration where a loss is to be measured."""


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

    Raises ``BadRequest`` for a file that is missing, empty, binary or of another form, or too short for one sample.
    """
    path = Path(settings.file).expanduser() if settings.file else SHIPPED
    ids = [token for document in _documents(path, tokenizer) for token in document if token < vocab_size]
    return cut_samples(ids, settings, f"{_KEY}: {str(path)!r}", max_length=max_length, held_out=held_out)


def cut_samples(
    ids: Sequence[int], settings: CalibrationSettings, what: str, *, max_length: int, held_out: bool
) -> Samples:
    """Samples evenly spread over ``ids``. Raises ``BadRequest`` that begins with ``what`` when there are too few."""
    length = min(settings.length, max_length)
    available = len(ids) // length
    if available < (2 if held_out else 1):
        raise BadRequest(
            f"{what} has {len(ids)} tokens; at least {length * (2 if held_out else 1)} are needed "
            f"(isq_calibration_length {length}{', one sample to calibrate on and one to measure' if held_out else ''})"
        )
    wanted = min(settings.num_samples + (settings.num_samples // _HELD_OUT or 1) * held_out, available)
    starts = [index * (len(ids) - length) // max(wanted - 1, 1) for index in range(wanted)]
    samples = torch.tensor([list(ids[start : start + length]) for start in starts])
    kept = torch.zeros(wanted, dtype=torch.bool)
    if held_out:
        kept[:: _HELD_OUT + 1] = True
    digest = hashlib.sha256(samples.numpy().tobytes() + kept.numpy().tobytes()).hexdigest()
    return Samples(samples[~kept], samples[kept], digest)


def _documents(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    text = _read(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield _record(f"{_KEY}: {str(path)!r}, line {number}", line, tokenizer)
    else:
        yield tokenizer.encode(text)


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


def _record(where: str, line: str, tokenizer: Tokenizer) -> list[int]:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise BadRequest(f"{where}: no JSON; give {_SHAPE}") from None
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
