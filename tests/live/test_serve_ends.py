"""scripts/serve when it cannot start, and when it is told to end while it is busy."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.tiny_models import write_tiny_llama
from tests.launch.helpers import END_SECONDS, ROOT, Launch
from tests.live.requests import EventStream, admin
from tests.live.serving import serving

pytestmark = pytest.mark.live
FAIL_SECONDS = 30.0
"""How soon a start that cannot succeed has ended."""


def unknown_folder(folder: Path) -> Path:
    return folder / "nowhere"


def empty_folder(folder: Path) -> Path:
    return folder


def corrupt_weights(folder: Path) -> Path:
    weights = write_tiny_llama(folder / "corrupt") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return weights.parent


@pytest.mark.parametrize(
    ("make_model", "code", "words"),
    [
        (unknown_folder, 2, ("[NOT_FOUND] --model ", "nowhere: no such file or folder")),
        (empty_folder, 1, ("[NOT_FOUND] model", "{model}")),
        (corrupt_weights, 1, ("[INTERNAL] {model}/model.safetensors: cannot be read as safetensors",)),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_start(
    tmp_path: Path, make_model: Callable[[Path], Path], code: int, words: tuple[str, ...]
) -> None:
    model = make_model(tmp_path)
    check_failed_start(tmp_path, code, [word.format(model=model) for word in words], "--model", str(model))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("block_size=17", "[INVALID_ARG] block_size: 17 is not one of 8, 16, 32, 64, 128"),
        ("blok_size=16", "[INVALID_ARG] unknown setting 'blok_size'; known settings: adapter_root"),
        ("tensor_parallel_size=2", "[INVALID_ARG] tensor_parallel_size: not available yet; leave it at its default"),
        ("isq_method=hqq", "[INVALID_ARG] isq_method: 'hqq' is not one of rtn, awq, gptq, smoothquant, fp8, none"),
        ("max_num_seqs=100000", "[INVALID_ARG] max_num_seqs: 100000 is not an integer from 1 to 65536"),
        ("max_queue_size=5000", "[INVALID_ARG] instance_group count * max_batch_size: 4 * 288 = 1152 is less than"),
    ],
)
def test_a_wrong_setting_ends_the_start(tmp_path: Path, setting: str, words: str) -> None:
    check_failed_start(tmp_path, 2, [words], "--set", setting)


def check_failed_start(folder: Path, code: int, words: list[str], *arguments: str) -> None:
    launch = Launch(folder, [str(ROOT / "scripts/serve")], *arguments)
    try:
        assert launch.process.wait(timeout=FAIL_SECONDS) == code
        assert all(word in launch.output for word in words), launch.output
        assert "Traceback" not in launch.output and "\nAt:" not in launch.output
        assert launch.leftovers() == []
    finally:
        launch.close()


def test_ctrl_c_during_eight_streams_leaves_nothing(tmp_path: Path) -> None:
    settings = ("--set", "admin_token=secret", "--set", "device=cpu", "--set", "max_num_blocks=1024", "--no-sample")
    with serving(tmp_path, *settings, "--set", "max_model_len=2048") as server:
        doors = ("llm", "llm_vllm") * 4
        streams = [EventStream(server, door, "Once upon a time", max_tokens=1500, ignore_eos=True) for door in doors]
        began = time.monotonic()
        while admin(server, "stats")["running_requests"] < len(streams):
            assert time.monotonic() - began < 30
            time.sleep(0.05)
        assert server.launch.end(signal.SIGINT) < END_SECONDS
        assert server.launch.process.returncode == 0
        assert server.launch.leftovers() == []
        for stream in streams:
            stream.close()
