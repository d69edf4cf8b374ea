"""Generations over a byte tokenizer, and what an engine would send them."""

from __future__ import annotations

from trident_llm.generation import Generation, Output
from trident_llm.options import RequestOptions
from trident_llm.protocol import Delta, Limits, Welcome
from trident_llm.text import Tokenizer

EOS = 256
WELCOME = Welcome(
    epoch="one",
    model="bytes",
    tokenizer_folder="",
    max_model_len=64,
    vocab_size=257,
    eos_token_ids=[EOS],
    max_num_seqs=4,
    max_queue_size=4,
    limits=Limits(max_n=4, max_stop_strings=4, max_logprobs=4, max_prompt_bytes=200),
)


def start(tokenizer: Tokenizer, prompt: str = "Hello", **options: object) -> Generation:
    parsed = RequestOptions.parse(
        options, limits=WELCOME.limits, max_model_len=WELCOME.max_model_len, vocab_size=WELCOME.vocab_size
    )
    return Generation("r", prompt, parsed, tokenizer, WELCOME)


def running(tokenizer: Tokenizer, prompt: str = "Hello", **options: object) -> Generation:
    generation = start(tokenizer, prompt, **options)
    generation.submit()
    return generation


def delta(text: str | bytes | list[int], offset: int = 0, **fields: object) -> Delta:
    data = text.encode() if isinstance(text, str) else text
    values: dict[str, object] = {"request_id": "r", "sample_index": 0, **fields}
    return Delta(offset=offset, token_ids=list(data), **values)  # type: ignore[arg-type]


def text_of(output: Output | None) -> str | None:
    return None if output is None else output.text
