"""Reading the Triton server's log."""

from __future__ import annotations

from pathlib import Path

from trident_llm.launch.server_log import TAIL_LINES, ServerLog, error_text, load_failure

QUOTED = (
    'E1123 03:47:53.438961 6740 model_lifecycle.cc:642] "failed to load \'llm\' version 1: Internal: '
    "TritonModelException: [NOT_FOUND] model: 'no/such'\\nis not there\\n\\nAt:\\n  /x/llm/1/model.py(7): "
    'initialize\\n"'
)
PLAIN = "E0215 21:04:11.572305 571 model_lifecycle.cc:642] failed to load 'llm' version 1: Invalid argument: bad config"


def test_error_lines_are_told_from_others() -> None:
    assert error_text('E1123 03:47:53.4 6740 a.cc:1] "some \\"text\\""') == 'some "text"'
    assert error_text('I1123 03:47:53.4 6740 a.cc:1] "some text"') is None
    assert error_text("Error: Failed to initialize NVML") is None
    assert error_text('E1123 03:47:53.4 6740 server.cc:241] "CudaDriverHelper has not been initialized."') is None


def test_a_failed_load_gives_the_models_own_text() -> None:
    assert load_failure(error_text(QUOTED) or "") == "llm: [NOT_FOUND] model: 'no/such'\nis not there"
    assert load_failure(error_text(PLAIN) or "") == "llm: bad config"
    assert load_failure("some other error") is None


def test_errors_are_reported_once_and_whole(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "server.log")
    log.path.write_text(PLAIN + "\n" + PLAIN[:40])
    assert len(log.new_errors()) == 1
    with log.path.open("a") as file:
        file.write(PLAIN[40:] + "\n")
    assert log.new_errors() == [PLAIN.partition("] ")[2]]
    assert log.new_errors() == []


def test_a_server_that_ended_gives_the_reasons_of_all_models(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "server.log")
    log.path.write_text(f"noise\n{QUOTED}\n{PLAIN.replace('llm', 'other')}\nmore noise\n")
    assert log.failure() == "llm: [NOT_FOUND] model: 'no/such'\nis not there\nother: bad config"


def test_without_a_known_reason_the_end_of_the_log_is_shown(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "server.log")
    log.path.write_text("".join(f"line {i}\n" for i in range(100)))
    assert log.failure().splitlines() == [f"line {i}" for i in range(100 - TAIL_LINES, 100)]
    log.path.write_text("")
    assert log.failure() == "its log is empty"
