"""What a door's requests leave behind: totals on its board, and lines of the log."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from tests.fakes.engine_runs import wait_until
from trident_llm.door_board import DoorBoard, read_doors
from trident_llm.errors import BadRequest
from trident_llm.logs import JsonFormatter, RequestLog, TextFormatter


def test_totals_of_a_door_outlive_it(tmp_path: Path):
    first, second = DoorBoard(tmp_path), DoorBoard(tmp_path)
    for board in (first, first, second):
        board.add("requests_accepted_total")
    first.set_live(2)
    second.set_live(1)
    assert read_doors(tmp_path).items() >= {"requests_accepted_total": 3, "doors": 2, "door_requests": 3}.items()
    first.close()
    assert read_doors(tmp_path).items() >= {"requests_accepted_total": 3, "doors": 1, "door_requests": 1}.items()
    second.close()
    assert read_doors(tmp_path / "none")["doors"] == 0


def test_every_request_is_counted_once(open_door):
    door = open_door()
    door.finish(door.submit("hello", max_tokens=5))
    door.finish(door.submit("<eos:2>", max_tokens=50))
    cancelled = door.submit("<silent>", max_tokens=50)
    door.client.cancel(cancelled)
    door.client.cancel(cancelled)
    suspended = door.submit("hello", max_tokens=300)
    door.client.suspend(suspended)
    assert read_doors(door.client.doors_folder)["door_requests"] == 1
    door.client.submit(suspended, lambda: None)
    door.finish(suspended)
    door.client.events.refused(BadRequest("no"), "")
    door.client.events.refused(ValueError("broken"), "")
    wait_until(lambda: read_doors(door.client.doors_folder)["door_requests"] == 0)
    totals = {key: count for key, count in read_doors(door.client.doors_folder).items() if count}
    assert totals == {
        "requests_accepted_total": 4,
        "requests_resubmitted_total": 1,
        "requests_finished_total.stop": 1,
        "requests_finished_total.length": 2,
        "requests_finished_total.cancelled": 1,
        "requests_refused_total.INVALID_ARG": 1,
        "requests_refused_total.INTERNAL": 1,
        "doors": 1,
    }


def formatted(formatter: logging.Formatter, level: int) -> list[str]:
    """Lines of a request whose client has a dangerous name for it."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(formatter.format(record))

    logger = logging.Logger("trident_llm.test", level)
    logger.addHandler(Lines())
    log = RequestLog(logger)
    log.begin("accepted", "door-1", "my id\nlevel=error", prompt_tokens=3)
    log.end("finished", "door-1", reason="stop", error="")
    log.end("finished", "door-1", reason="stop")
    return lines


def test_lines_of_a_request_have_both_ids():
    lines = formatted(TextFormatter("llm_0_0"), logging.DEBUG)
    assert [line.partition(" llm_0_0 ")[2] for line in lines] == [
        'DEBUG trident_llm.test: request accepted request_id=door-1 client_id="my id\\nlevel=error" prompt_tokens=3',
        'DEBUG trident_llm.test: request finished request_id=door-1 client_id="my id\\nlevel=error" reason=stop',
        "DEBUG trident_llm.test: request finished request_id=door-1 reason=stop",
    ]
    first = json.loads(formatted(JsonFormatter("engine"), logging.DEBUG)[0])
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "debug",
        "process": "engine",
        "logger": "trident_llm.test",
        "message": "request accepted",
        "request_id": "door-1",
        "client_id": "my id\nlevel=error",
        "prompt_tokens": 3,
    }


def test_nothing_is_told_above_debug():
    assert formatted(TextFormatter("llm_0_0"), logging.INFO) == []
