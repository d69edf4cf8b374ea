"""The command line in processes of their own, as a shell runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.fakes.fake_triton import Answer, Fail, FakeTriton, Hang
from trident_client.cli import main, stats_table


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trident_client.cli", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


def test_generate_prints_the_text(capsys: pytest.CaptureFixture[str]):
    with FakeTriton() as server:
        assert main(["generate", "Hi", "--url", server.url]) == 0
        assert server.generations[0].text_input == "Hi"
        assert server.generations[0].parameters["stream"] is True
    assert capsys.readouterr().out == "Hello, world\n"


def test_options_reach_the_server():
    arguments = ["--max-tokens", "5", "--temperature=0.5", "--presence-penalty", "-1.5", "--stop", "[", "--stop", "x"]
    arguments += ["--ignore-eos", "--logit-bias", '{"5": -1}', "--no-stream", "--option", "adapter=a=b"]
    with FakeTriton() as server:
        assert main(["generate", "Hi", "--url", server.url, *arguments]) == 0
        parameters = server.generations[0].parameters
    expected = {
        "max_tokens": 5,
        "temperature": 0.5,
        "presence_penalty": -1.5,
        "stop": '["[", "x"]',
        "ignore_eos": True,
        "logit_bias": '{"5": -1}',
        "adapter": "a=b",
        "stream": False,
    }
    assert {name: parameters[name] for name in expected} == expected
    assert "top_p" not in parameters


def test_json_has_all_that_is_known(capsys: pytest.CaptureFixture[str]):
    with FakeTriton(num_input_tokens=9) as server:
        assert main(["generate", "Hi", "--url", server.url, "--json", "--logprobs", "0"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["num_input_tokens"] == 9
    assert answer["samples"][0]["text"] == "Hello, world"
    assert answer["samples"][0]["finish_reason"] == "stop"


def test_usage_goes_to_standard_error(capsys: pytest.CaptureFixture[str]):
    with FakeTriton() as server:
        main(["generate", "Hi", "--url", server.url, "--usage"])
    captured = capsys.readouterr()
    assert captured.out == "Hello, world\n"
    assert "4 input tokens, 3 output tokens" in captured.err
    assert "finish reason: stop" in captured.err


def test_several_answers_are_numbered(capsys: pytest.CaptureFixture[str]):
    with FakeTriton(Answer(("a",)), samples=2) as server:
        assert main(["generate", "Hi", "--url", server.url, "--n", "2"]) == 0
    assert capsys.readouterr().out == "[1] a\n[2] a\n"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[INVALID_ARG] max_tokens: 'abc' is not allowed", 2),
        ("[UNAVAILABLE] the queue is full; retry after 99 s", 3),
        ("[INTERNAL] the engine broke", 1),
    ],
)
@pytest.mark.parametrize("command", [["generate", "Hi", "--max-tokens", "abc"], ["generate", "Hi", "--no-stream"]])
def test_errors_are_one_line_and_an_exit_code(
    command: Sequence[str], text: str, code: int, capsys: pytest.CaptureFixture[str]
):
    with FakeTriton(Fail(text)) as server:
        assert main([*command, "--url", server.url]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"trident: error: {text}\n"


def test_no_server_is_an_error_without_a_traceback():
    process = start("stats", "--url", "127.0.0.1:1")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (3, "")
    assert err.startswith("trident: error: [UNAVAILABLE] no connection to the server at 127.0.0.1:1")
    assert len(err.splitlines()) == 1


def test_a_bad_url_and_bad_usage_exit_with_2(capsys: pytest.CaptureFixture[str]):
    assert main(["stats", "--url", "localhost"]) == 2
    assert "url: 'localhost' is not host:port" in capsys.readouterr().err
    for arguments in (
        [],
        ["generate"],
        ["generate", "Hi", "--no-such-option", "1"],
        ["generate", "Hi", "--option", "x"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_the_prompt_may_come_from_standard_input():
    with FakeTriton() as server:
        process = start("generate", "-", "--url", server.url)
        out, err = process.communicate("two\nlines", timeout=30)
        assert (process.returncode, out, err) == (0, "Hello, world\n", "")
        assert server.generations[0].text_input == "two\nlines"


def test_input_that_is_no_utf8_is_refused_by_name():
    process = subprocess.run(
        [sys.executable, "-m", "trident_client.cli", "generate", "-", "--url", "127.0.0.1:1"],
        input=b"\xff\xfe",
        capture_output=True,
        env={**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        timeout=30,
    )
    assert process.returncode == 2
    assert process.stderr.startswith(b"trident: error: [INVALID_ARG] text_input: is not valid text")


def test_ctrl_c_cancels_the_answer():
    with FakeTriton(Hang(("a", "b"))) as server:
        process = start("generate", "Hi", "--url", server.url)
        assert process.stdout is not None
        assert process.stdout.read(2) == "ab"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert server.generations[0].cancelled.wait(1)
    assert (process.returncode, out, err) == (130, "", "\n")


def test_a_reader_that_leaves_cancels_the_answer():
    with FakeTriton(Answer(("abc",) * 1000, delay=0.01)) as server:
        process = start("generate", "Hi", "--url", server.url)
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(3) == "abc"
        process.stdout.close()
        assert server.generations[0].cancelled.wait(5)
        assert process.wait(timeout=10) == 141
        assert process.stderr.read() == ""
        process.stderr.close()
        process.communicate()


def test_stats_are_a_table(capsys: pytest.CaptureFixture[str]):
    with FakeTriton() as server:
        server.results["stats"] = {"running_requests": 12345, "epoch": "e1", "hit_ratio": 0.5, "pool": {"free": 3}}
        assert main(["stats", "--url", server.url]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "running_requests  12,345",
            "epoch             e1",
            "hit_ratio         0.500",
            "",
            "pool",
            "  free  3",
        ]
        assert main(["stats", "--url", server.url, "--json", "--admin-token", "secret"]) == 0
        assert json.loads(capsys.readouterr().out)["pool"] == {"free": 3}
        assert server.commands[-1] == ("stats", {"admin_token": "secret"})


def test_a_table_of_nothing_is_empty():
    assert stats_table({}) == ""
