"""The folder in which an engine and its doors meet."""

from __future__ import annotations

import os
import subprocess

import pytest

from trident_llm.errors import LoadFailed
from trident_llm.run_directory import EngineStatus, RunDirectory


def test_run_directory_refuses_long_paths_and_foreign_parents(tmp_path):
    with pytest.raises(LoadFailed, match="TRIDENT_RUN_DIR"):
        RunDirectory(tmp_path / ("x" * 120))
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(LoadFailed, match="does not belong"):
        RunDirectory(link / "1-llm").create()


def test_stale_folders_are_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale, own = RunDirectory(tmp_path / f"{ended.pid}-llm"), RunDirectory(tmp_path / f"{os.getpid()}-llm")
    for folder in (stale, own):
        folder.create()
        folder.write_status(EngineStatus(state="ready", pid=1))
    own.remove_stale_siblings()
    assert not stale.path.exists()
    assert own.read_status() is not None
