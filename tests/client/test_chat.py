"""Conversations: what is remembered, and what ends an answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.fakes.fake_triton import Answer, Fail, FakeTriton, Generation, Hang


def start(server: FakeTriton, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trident_client.cli", "chat", "--url", server.url, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


def messages(generation: Generation) -> list[dict[str, Any]]:
    assert generation.text_input == ""
    return json.loads(str(generation.parameters["messages"]))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}


def test_history_grows_until_it_is_reset():
    with FakeTriton(Answer(("one",)), Answer(("two", "!")), Answer(("three",))) as server:
        process = start(server, "--system", "Be brief.", "--max-tokens", "9")
        out, err = process.communicate("first\nsecond\n\n/reset\n/what\nthird\n/exit\nnever\n", timeout=30)
        asked = [messages(generation) for generation in server.generations]
        assert all(generation.parameters["max_tokens"] == 9 for generation in server.generations)
    assert asked == [
        [SYSTEM, user("first")],
        [SYSTEM, user("first"), assistant("one"), user("second")],
        [SYSTEM, user("third")],
    ]
    lines = out.splitlines()
    assert lines[:2] == ["one", "two!"]
    assert lines[2].startswith("/reset forgets")
    assert lines[3:] == ["three"]
    assert (process.returncode, err) == (0, "")


def test_ctrl_c_stops_the_answer_and_keeps_the_chat():
    with FakeTriton(Hang(("par", "tial")), Answer(("ok",))) as server:
        process = start(server)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("first\n")
        assert process.stdout.read(7) == "partial"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == " [stopped]\n"
        assert server.generations[0].cancelled.wait(1)
        out, err = process.communicate("second\n", timeout=30)
        assert messages(server.generations[1]) == [user("first"), assistant("partial"), user("second")]
    assert (process.returncode, out, err) == (0, "ok\n", "")


def test_ctrl_c_between_answers_says_how_to_leave():
    with FakeTriton() as server:
        process = start(server)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("first\n")
        assert process.stdout.readline() == "Hello, world\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "\n"
        assert "/exit leaves" in process.stdout.readline()
        process.communicate("/exit\n", timeout=30)
    assert process.returncode == 0


@pytest.mark.parametrize(("last", "code"), [("", 2), ("third\n", 0)])
def test_a_failed_question_is_forgotten_and_the_chat_goes_on(last: str, code: int):
    text = "[INVALID_ARG] messages: 9000 tokens are too many"
    with FakeTriton(Answer(("one",)), Fail(text, tokens=("x",)), Answer(("three",))) as server:
        process = start(server)
        _, err = process.communicate("first\nsecond\n" + last, timeout=30)
        assert err == f"error: {text}\n"
        assert process.returncode == code
        if last:
            assert messages(server.generations[2]) == [user("first"), assistant("one"), user("third")]
