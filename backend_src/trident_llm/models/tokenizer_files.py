"""Gives every model a folder that the ``tokenizers`` library alone can use, converting once where needed.

Readers of such a folder find: tokenizer.json (always); tokenizer_config.json, if there, with bos_token, eos_token,
pad_token, unk_token (a string, or an object with ``content``) and possibly chat_template (a string, or a list of
``{"name", "template"}``); and chat_template.jinja, if there, which then wins over tokenizer_config.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ..errors import BadRequest, LoadFailed, NotFound
from .gguf_file import open_gguf
from .source import ModelSource

_CONVERTIBLE = ("tokenizer.model", "vocab.json")
"""Files that transformers can build a tokenizer from; one is enough to try."""
_IDENTITY_FILES = (
    "config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_NUM_BYTES = 256
_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
_MIN_VOCAB = len(_SPECIAL_TOKENS) + _NUM_BYTES
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def prepare_tokenizer(source: ModelSource, *, progress: Callable[[str], None] | None = None) -> Path:
    """The folder with the model's tokenizer.json: its own, or a converted copy in the user's cache.

    The copy lies in $XDG_CACHE_HOME (~/.cache)/trident/tokenizers/<hash of what it was made from>; several processes
    may make it at once. Raises ``NotFound`` for a model without tokenizer, ``LoadFailed`` if it cannot be converted.
    """
    if source.format == "gguf":
        digest, gguf_file = _gguf_identity(source.weight_files[0]), source.weight_files[0].name
    elif (source.folder / "tokenizer.json").is_file():
        return source.folder
    elif any((source.folder / name).is_file() for name in _CONVERTIBLE):
        digest, gguf_file = _folder_identity(source.folder), None
    else:
        raise NotFound(f"model: {source.name!r} has no tokenizer: none of tokenizer.json, {', '.join(_CONVERTIBLE)}")
    target = _cache_root() / digest
    if not (target / "tokenizer.json").is_file():
        if progress is not None:
            progress(f"converting the tokenizer of {source.name} (once)")
        _make_folder(target, lambda made: _convert(source.folder, gguf_file, made))
    return target


def _gguf_identity(path: Path) -> str:
    file = open_gguf(path)
    if "tokenizer.ggml.tokens" not in file.metadata:
        raise NotFound(f"model: {path} has no tokenizer (tokenizer.ggml.tokens)")
    with path.open("rb") as stream:
        return _digest([stream.read(file.header_bytes)])


def _folder_identity(folder: Path) -> str:
    paths = [folder / name for name in _IDENTITY_FILES]
    return _digest([path.read_bytes() if path.is_file() else b"" for path in paths])


def _digest(parts: list[bytes]) -> str:
    """A hash of the parts and of the library that converts them."""
    digest = hashlib.sha256(version("transformers").encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trident" / "tokenizers"


def _make_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside ``target`` and rename it there, so that nobody sees half of it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix="making-", dir=target.parent))
        try:
            fill(made)
            made.rename(target)
        except OSError:
            # A folder cannot be renamed over one with files in it: then another process was first.
            if not (target / "tokenizer.json").is_file():
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise LoadFailed(f"cannot write the tokenizer cache {target} (XDG_CACHE_HOME): {error}") from error


def _convert(folder: Path, gguf_file: str | None, made: Path) -> None:
    if not gguf_file and (folder / "tokenizer.model").is_file() and find_spec("sentencepiece") is None:
        raise LoadFailed(
            f"{folder / 'tokenizer.model'}: converting it needs the package sentencepiece; run pip install "
            "sentencepiece==0.2.1, or put the model's tokenizer.json into the folder"
        )
    # Importing transformers takes seconds and hundreds of megabytes, which only a conversion is worth.
    from transformers import AutoTokenizer

    extra = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **extra)
        tokenizer.save_pretrained(str(made))
    except Exception as error:
        # Whatever a converter trips over in the files of this model, the user learns which model it was.
        raise LoadFailed(f"{folder / (gguf_file or '')}: the tokenizer cannot be converted: {error}") from error
    if not (made / "tokenizer.json").is_file():
        raise LoadFailed(f"{folder / (gguf_file or '')}: transformers has no fast tokenizer for this model")


def byte_tokenizer_folder(vocab_size: int) -> Path:
    """A folder in the user's cache with the tokenizer of ``write_byte_tokenizer``."""
    target = _cache_root() / f"bytes-{vocab_size}"
    if not (target / "tokenizer.json").is_file():
        _make_folder(target, lambda made: write_byte_tokenizer(made, vocab_size))
    return target


def write_byte_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer for models with random weights: one token per byte (ids 3 to 258), <unk>, <s> and </s>
    before them, and readable filler tokens that no text encodes to up to ``vocab_size``.

    Raises ``BadRequest`` when the vocabulary has no room for the bytes.
    """
    if vocab_size < _MIN_VOCAB:
        raise BadRequest(f"vocab_size: {vocab_size} is less than the {_MIN_VOCAB} tokens of a byte-level tokenizer")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = "Ġ"
    words = [*_SPECIAL_TOKENS, *alphabet, *(f"{space}t{token_id}" for token_id in range(_MIN_VOCAB, vocab_size))]
    unknown, begin, end = _SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in _SPECIAL_TOKENS])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
        "bos_token": begin,
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
