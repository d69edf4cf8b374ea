"""The sample prompt that shows, after a start, that the server answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TextIO

from trident_client import BadRequest, Chunk, TridentClient, TridentError

QUESTION = "What is the capital of France?"
_TIMEOUT = 120.0
_MAX_TOKENS = 32


def answer_sample(address: str, stream: TextIO) -> None:
    """Ask the model ``llm`` at ``address`` (host:port, gRPC) a question; its answer appears as it comes.

    A failure is shown and not raised: the server runs, and the next request may do better.
    """
    stream.write(f"\n> {QUESTION}\n")
    started, num_tokens = time.monotonic(), 0
    try:
        with TridentClient(address) as client:
            for chunk in _chunks(client):
                num_tokens += chunk.num_output_tokens or 0
                stream.write(chunk.text)
                stream.flush()
    except TridentError as error:
        stream.write(f"the sample prompt failed: {error}\n")
        return
    stream.write(f"\n({num_tokens} tokens in {time.monotonic() - started:.1f} s)\n")


def _chunks(client: TridentClient) -> Iterator[Chunk]:
    """As a chat, or as plain text where the model has no chat template."""
    try:
        messages = [{"role": "user", "content": QUESTION}]
        yield from client.generate(messages, timeout=_TIMEOUT, max_tokens=_MAX_TOKENS, temperature=0.0)
    except BadRequest:
        yield from client.generate(QUESTION, timeout=_TIMEOUT, max_tokens=_MAX_TOKENS, temperature=0.0)
