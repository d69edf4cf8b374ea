"""Text to token ids and back with a model's tokenizer.json, and the model's chat template.

Stands on the ``tokenizers`` library alone: no transformers, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import BadRequest, LoadFailed
from .chat_template import ChatTemplate
from .detokenizer import ByteLevelDetokenizer, Detokenizer, SentencePieceDetokenizer, piece_bytes, read_decoder

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of the model in ``folder``: tokenizer.json, and if there are tokenizer_config.json,
    special_tokens_map.json, chat_template.jinja and chat_template.json. Raises ``LoadFailed`` naming the file.

    Ids may be fewer than the model's vocabulary: those beyond have no text.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        self._tokenizer = _read_tokenizer(path)
        config = _read_json(folder / "tokenizer_config.json")
        self.special_tokens = _special_tokens(_read_json(folder / "special_tokens_map.json") | config)
        """Name -> text, of those that the model has: bos_token, eos_token, unk_token, ..."""
        self.chat_template = _read_chat_template(folder, config, self.special_tokens)
        """None: the model has none."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        decoder = self._tokenizer.decoder
        try:
            self._spec = read_decoder(None if decoder is None else json.loads(decoder.__getstate__()))
        except LoadFailed as error:
            raise LoadFailed(f"{path}: {error.message}") from None

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def num_tokens(self) -> int:
        """Ids that have a text, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, with the model's own beginning of sequence if it asks for one.

        Raises ``BadRequest`` when the text has no UTF-8 form.
        """
        try:
            # A batch of one: unlike ``encode`` it lets other threads run meanwhile, and computes no offsets.
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (UnicodeEncodeError, TypeError):
            raise BadRequest("text_input: has no UTF-8 form (an unpaired surrogate); send UTF-8 text") from None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, *, after: Sequence[int] = ()) -> Detokenizer:
        """For a sequence that begins a text, or that goes on with the text of ``after``: a sentencepiece decoder
        takes the space off the start of a text, and must leave it between a prompt and what follows."""
        if self._spec is None:
            return ByteLevelDetokenizer(self._piece, self._bytes)
        at_start = not any(self._piece(token_id) for token_id in reversed(after))
        return SentencePieceDetokenizer(self._piece, self._spec, at_start=at_start)

    def token_text(self, token_id: int) -> str:
        """One token by itself, special tokens and leading spaces included; U+FFFD for a part of a character."""
        text = self._texts.get(token_id)
        if text is None:
            piece = self._tokenizer.id_to_token(token_id) or ""
            if self._spec is None:
                text = piece_bytes(piece).decode("utf-8", errors="replace")
            else:
                text = self._spec.text(piece, is_first=False)
            self._texts[token_id] = text
        return text

    def render_chat(self, messages: Sequence[dict[str, Any]], *, max_chars: int) -> str:
        """The prompt for ``messages``. Encode it without adding special tokens: the template writes them itself."""
        if self.chat_template is None:
            raise BadRequest("messages: this model has no chat template; send text_input")
        return self.chat_template.render(messages, max_chars=max_chars)

    def _piece(self, token_id: int) -> str | None:
        piece = self._tokenizer.id_to_token(token_id)
        return None if piece in self._special else piece


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise LoadFailed(f"{path}: no such file")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise LoadFailed(f"{path}: not a tokenizer ({str(error)[:200]})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if hasattr(tokenizer.model, "_resize_cache"):
        # It would remember 10,000 words at up to 8 KB each, and save 0.3 us a token: a door would grow for days.
        tokenizer.model._resize_cache(0)
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise LoadFailed(f"{path}: no JSON ({error})") from None
    if not isinstance(content, dict):
        raise LoadFailed(f"{path}: must hold a JSON object")
    return content


def _special_tokens(content: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_TOKENS:
        value = content.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _read_chat_template(folder: Path, config: dict[str, Any], special_tokens: dict[str, str]) -> ChatTemplate | None:
    """The first of chat_template.jinja, chat_template.json and tokenizer_config.json that has one."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return ChatTemplate(path.read_text("utf-8"), special_tokens, str(path))
        except UnicodeDecodeError:
            raise LoadFailed(f"{path}: not valid UTF-8") from None
    path = folder / "chat_template.json"
    source = _read_json(path).get("chat_template")
    if source is None:
        path, source = folder / "tokenizer_config.json", config.get("chat_template")
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise LoadFailed(f"{path}: chat_template must be a string")
    return ChatTemplate(source, special_tokens, str(path))
