"""A conversation in a terminal: history, streamed answers, commands. Knows the client's generate, nothing of gRPC."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from .client import TridentClient
from .errors import TridentError

HELP = "/reset forgets the conversation, /exit leaves; Ctrl-C stops an answer"


class Chat:
    """The messages so far and the way to add to them. ``failure`` is the error of the last turn, if it had one."""

    def __init__(
        self,
        client: TridentClient,
        options: Mapping[str, Any],
        *,
        system: str | None = None,
        timeout: float | None = None,
    ) -> None:
        self._client = client
        self._options = options
        self._timeout = timeout
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._opening)
        self.failure: TridentError | None = None

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._opening)

    def ask(self, question: str) -> None:
        """Print the answer as it comes and remember both.

        A failed or unanswered question is forgotten; of an answer stopped by Ctrl-C, what was printed is kept.
        """
        self.failure = None
        messages = [*self.messages, {"role": "user", "content": question}]
        answer = ending = ""
        try:
            with closing(self._client.generate(messages, timeout=self._timeout, **self._options)) as chunks:
                for chunk in chunks:
                    answer += chunk.text
                    print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:
            ending = " [stopped]"
        except TridentError as error:
            self.failure, answer = error, ""
        if answer:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
        print(ending, flush=True)
        if self.failure is not None:
            print(f"error: {self.failure}", file=sys.stderr, flush=True)

    def run(self) -> None:
        """Read questions until /exit or the end of the input."""
        interactive = sys.stdin.isatty()
        if interactive:
            print(HELP)
        while True:
            try:
                line = input("> " if interactive else "").strip()
                if line == "/exit":
                    return
                self._obey(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                print(f"\n{HELP}", flush=True)

    def _obey(self, line: str) -> None:
        if line == "/reset":
            self.reset()
        elif line.startswith("/"):
            print(HELP)
        elif line:
            self.ask(line)
