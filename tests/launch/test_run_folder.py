"""The private folder of a launch, and the removal of what belongs to one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from trident_llm.errors import LoadFailed
from trident_llm.launch import run_folder
from trident_llm.launch.run_folder import RUN_VARIABLE, SHARED_MEMORY, RunFolder, new_run_folder, remove_stale
from trident_llm.launch.watchdog import Watchdog


@pytest.fixture
def folder() -> Iterator[Path]:
    """Shorter than tmp_path: a socket's path has 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="trident-", dir="/tmp") as name:
        yield Path(name)


def start_member(run: RunFolder) -> subprocess.Popen[bytes]:
    """A process as the launch's server starts them: in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        env={**os.environ, RUN_VARIABLE: str(run.path)},
        start_new_session=True,
    )


def has_ended(process: subprocess.Popen[bytes], within: float = 5.0) -> bool:
    """Its exit code is not looked at: whoever clears a launch may collect it before the test does."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=within)
    return process.returncode is not None


def make_region(run: RunFolder) -> Path:
    region = SHARED_MEMORY / f"{run.shared_memory_prefix}region"
    region.write_bytes(b"0")
    return region


def test_the_folder_is_private_and_locked(folder: Path) -> None:
    with new_run_folder(folder) as run:
        assert run.path.parent == folder and run.path.stat().st_mode & 0o777 == 0o700
        assert remove_stale(folder) == [] and run.path.exists()


def test_a_path_too_long_for_a_socket_is_refused(folder: Path) -> None:
    parent = folder / ("x" * 60)
    parent.mkdir()
    with pytest.raises(LoadFailed, match=f"longer than 107 bytes; set {RUN_VARIABLE}"), new_run_folder(parent):
        pass
    assert list(parent.iterdir()) == []


def test_clear_ends_processes_and_removes_memory_and_files(folder: Path) -> None:
    with new_run_folder(folder) as run, new_run_folder(folder) as other:
        member, stranger = start_member(run), start_member(other)
        mine, theirs = make_region(run), make_region(other)
        run.clear()
        assert has_ended(member) and not has_ended(stranger, within=0)
        assert not mine.exists() and theirs.exists()
        assert not run.path.exists() and other.path.exists()
        other.clear()
        assert has_ended(stranger) and not theirs.exists()


def test_clear_lets_processes_end_by_themselves(folder: Path) -> None:
    with new_run_folder(folder) as run:
        script = f"import time; time.sleep(0.3); open({str(folder / 'done')!r}, 'w')"
        member = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, RUN_VARIABLE: str(run.path)})
        run.clear(grace=20)
        assert has_ended(member) and (folder / "done").exists()


def test_clear_removes_the_empty_folders_of_a_killed_backend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "BACKEND_FOLDERS", folder / "python_env_*")
    with new_run_folder(folder) as run:
        started = run.lock.stat().st_mtime
        for name, age in {"before": -5, "mine": 5, "filled": 5, "after": 20}.items():
            (folder / f"python_env_{name}").mkdir()
            if name == "filled":
                (folder / "python_env_filled/file").touch()
            os.utime(folder / f"python_env_{name}", (started + age, started + age))
        run.ready.touch()
        os.utime(run.ready, (started + 10, started + 10))
        run.clear()
    left = sorted(path.name.removeprefix("python_env_") for path in folder.iterdir())
    assert left == ["after", "before", "filled"]


def test_what_a_dead_launch_left_is_removed(folder: Path) -> None:
    with new_run_folder(folder) as run:
        member, region = start_member(run), make_region(run)
    with new_run_folder(folder) as alive:
        assert remove_stale(folder) == [run]
        assert has_ended(member)
        assert not region.exists() and not run.path.exists() and alive.path.exists()


def test_the_watchdog_clears_when_its_launcher_is_gone(folder: Path) -> None:
    with new_run_folder(folder) as run:
        member, region = start_member(run), make_region(run)
        script = (
            "import os, sys; from pathlib import Path; from trident_llm.launch.run_folder import RunFolder; "
            "from trident_llm.launch.watchdog import Watchdog; "
            "Watchdog(RunFolder(Path(sys.argv[1]))); os.kill(os.getpid(), 9)"
        )
        subprocess.run([sys.executable, "-c", script, str(run.path)], check=False)
        assert has_ended(member, within=20)
        deadline = time.monotonic() + 20
        while (region.exists() or run.path.exists()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not region.exists() and not run.path.exists()


def test_a_released_watchdog_is_gone(folder: Path) -> None:
    with new_run_folder(folder) as run:
        watchdog = Watchdog(run)
        children = psutil.Process().children()
        watchdog.release()
        assert run.path.exists()
        assert not [child for child in children if child.is_running() and str(run.path) in child.cmdline()]
