"""The file in which the engine says what it does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trident_llm.step_board import BoardState, StepBoard, read_board, read_num_places


def look(path: Path) -> BoardState:
    state = read_board(path)
    assert state is not None
    return state


def test_requests_of_steps_in_flight_can_be_read(tmp_path: Path):
    path = tmp_path / "board"
    board = StepBoard(path, 4)
    assert look(path).request_ids == frozenset()
    board.begin(["a", "b"])
    assert look(path).request_ids == {"a", "b"}
    board.begin(["b", "c"])
    assert look(path).request_ids == {"a", "b", "c"}
    board.complete()
    assert look(path).request_ids == {"b", "c"}
    board.begin(["d"])
    board.complete()
    assert (look(path).request_ids, look(path).num_completed, look(path).pid) == ({"d"}, 2, os.getpid())
    board.complete()
    assert look(path).request_ids == frozenset()


def test_a_request_that_breaks_the_taking_in_leaves_its_name(tmp_path: Path):
    board = StepBoard(tmp_path / "board", 4)
    with board.adding("good"):
        assert look(tmp_path / "board").request_ids == {"good"}
    assert look(tmp_path / "board").request_ids == frozenset()
    with pytest.raises(ValueError), board.adding("bad"):
        raise ValueError
    assert look(tmp_path / "board").request_ids == {"bad"}


def test_time_and_places(tmp_path: Path):
    path = tmp_path / "board"
    board = StepBoard(path, 4)
    board.busy()
    time.sleep(0.05)
    assert 0.05 <= look(path).busy_seconds < 1.0
    board.set_places(-3)
    board.idle()
    assert (look(path).busy_seconds, look(path).num_places, read_num_places(path)) == (0, -3, -3)


def test_a_reader_never_sees_half_a_number(tmp_path: Path):
    path = tmp_path / "board"
    code = f"""
from pathlib import Path
from trident_llm.step_board import StepBoard
board = StepBoard(Path({str(path)!r}), 4)
board.set_places(5)
print("ready", flush=True)
while True:
    board.busy()
    board.set_places(5)
    board.idle()
"""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    writer = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None and writer.stdout.readline()
        assert {read_num_places(path) for _ in range(50_000)} == {5}
    finally:
        writer.kill()
        writer.communicate()


def test_more_ids_than_there_is_room_for_are_cut(tmp_path: Path):
    board = StepBoard(tmp_path / "board", 1)
    board.begin(f"{number:060}" for number in range(3))
    board.begin(["next"])
    board.complete()
    assert look(tmp_path / "board").request_ids == {"next"}


def test_it_outlives_its_process_and_a_new_one_begins_afresh(tmp_path: Path):
    path = tmp_path / "board"
    code = f"""
import os
from pathlib import Path
from trident_llm.step_board import StepBoard
board = StepBoard(Path({str(path)!r}), 4)
board.begin(["a"])
board.complete()
board.begin(["b"])
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": os.pathsep.join(sys.path)})
    assert ended.returncode == -9
    assert (look(path).request_ids, look(path).num_completed) == ({"b"}, 1)
    StepBoard(path, 4)
    assert (look(path).request_ids, look(path).num_completed) == (frozenset(), 0)


def test_no_board_says_nothing(tmp_path: Path):
    assert read_board(tmp_path / "board") is None
    assert read_num_places(tmp_path / "board") is None
    (tmp_path / "board").write_bytes(b"short")
    assert read_board(tmp_path / "board") is None
    assert read_num_places(tmp_path / "board") is None
