"""Users over gRPC: plain streams, conversations, long prompts, bursts, adapters, and wrong input."""

from __future__ import annotations

import time
from typing import Any

import gevent
from bad_options import BAD_OPTIONS
from gevent.pool import Group
from load_user import REQUEST_SECONDS, LoadUser, WrongAnswer
from locust import task

from trident_client import BadRequest

SYSTEM_PROMPT = (
    "You are a patient assistant of a public library. You help readers to find books, explain words they do not know, "
    "and say plainly when you do not know something yourself. Answer in short sentences. Name the author of every book "
    "that you mention. Do not invent titles. When a reader asks for something that a library cannot give, such as "
    "medical or legal advice, tell them whom to ask instead. Be kind to children."
)
"""All conversations share it, and so its blocks in the prefix cache."""
QUESTIONS = (
    "What should I read next?",
    "Who wrote it, and when?",
    "Is there a shorter book about the same?",
    "What does the title mean?",
    "Would a child of ten like it?",
    "Which of its chapters is the best?",
    "Was it translated into French?",
    "Where in the library would I find it?",
)
TURNS = 4
"""Questions of one conversation."""
BURST = 8
"""Requests that a burst sends at once."""
BURST_PAUSE = 4.0
"""Mean seconds between bursts."""


class StreamUser(LoadUser):
    """Asks with random text, reads the answer to its end, and asks again. The load of bench_server."""

    kind = "stream"

    @task
    def stream(self) -> None:
        self.ask(self.text(self.sample(self.profile.prompt_tokens)), self.options())


class ChatUser(LoadUser):
    """Talks: every question carries the whole conversation so far, which begins with the shared system prompt."""

    kind = "chat"

    @task
    def talk(self) -> None:
        messages = [{"role": "system", "content": SYSTEM_PROMPT}]
        for _ in range(TURNS):
            question = f"{self.random.choice(QUESTIONS)} {self.text(self.sample(self.profile.prompt_tokens) // 4 + 1)}"
            messages.append({"role": "user", "content": question})
            answer = self.ask(self.rendered(messages), self.options())
            if answer is None:
                return
            messages.append({"role": "assistant", "content": answer.text})
            gevent.sleep(self.wait_time())

    def rendered(self, messages: list[dict[str, str]]) -> Any:
        """The messages, or plain text for a model without a chat template."""
        if self.plan.has_chat_template:
            return messages
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages) + "\nassistant:"


class LongPromptUser(LoadUser):
    """Sends prompts that keep the engine busy for many steps of prefill, and wants short answers."""

    kind = "long_prompt"

    @task
    def summarize(self) -> None:
        options = {**self.options(), "max_tokens": self.profile.max_tokens.low}
        self.ask(self.text(self.sample(self.profile.long_prompt_tokens)), options)


class BurstUser(LoadUser):
    """Sends several requests at the same moment, waits for all of them, and pauses."""

    kind = "burst"

    def wait_time(self) -> float:
        return BURST_PAUSE * self.random.uniform(0.5, 1.5)

    @task
    def burst(self) -> None:
        group = Group()
        try:
            for _ in range(BURST):
                group.spawn(self.ask, self.text(self.sample(self.profile.prompt_tokens)), self.options())
            group.join()
        finally:
            group.kill()


class AdapterMixUser(LoadUser):
    """Asks with one adapter, a blend of two, the X-LoRA mix where there is one, or none, by turns at random."""

    kind = "adapter_mix"

    @task
    def adapted(self) -> None:
        self.ask(self.text(self.sample(self.profile.prompt_tokens)), {**self.options(), **self.adaptation()})

    def adaptation(self) -> dict[str, Any]:
        """The options that say which."""
        names = self.plan.adapters
        choices: list[dict[str, Any]] = [{}]
        if names:
            choices.append({"adapter": self.random.choice(names)})
        if len(names) > 1:
            first, second = self.random.sample(names, 2)
            choices.append({"adapter": f"{first}:0.7,{second}:0.3"})
        if self.plan.has_mix:
            choices.append({"xlora": True})
        chosen = self.random.choice(choices)
        # An adapter and the mix exclude each other, so what declines the mix must go, too.
        return {"xlora": None, **chosen} if "adapter" in chosen else chosen


class WrongInputUser(LoadUser):
    """Sends options that the server must refuse with INVALID_ARG, naming them. A refusal is its success."""

    kind = "wrong_input"

    @task
    def mistake(self) -> None:
        name, value = self.random.choice(BAD_OPTIONS)
        start = time.perf_counter()
        with self.reporting_failures("refusal"):
            options = {**self.options(), name: value}
            try:
                self.client.generate(self.text(16), stream=False, timeout=REQUEST_SECONDS, **options)
            except BadRequest as error:
                if name not in error.message:
                    raise WrongAnswer(f"the refusal of {name} does not name it: {error}") from None
                self.report(refusal=1e3 * (time.perf_counter() - start))
            else:
                raise WrongAnswer(f"{name}={value!r} was not refused")
