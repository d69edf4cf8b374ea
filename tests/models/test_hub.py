"""Models by Hugging Face id, against a local hub. huggingface_hub reads its settings on import, hence the processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.fake_hub import COMMIT, FakeHub, FakeRepo
from trident_llm.models import hub as hub_module

OTHER_COMMIT = "2" * 40
CONFIG = b'{"architectures": ["LlamaForCausalLM"]}'
INDEX = json.dumps({"weight_map": {"b": "model-2.safetensors", "a": "model-1.safetensors"}}).encode()

CHILD = """
import json, sys
from trident_llm.errors import TridentError
from trident_llm.models.source import resolve_model
lines = []
try:
    source = resolve_model(sys.argv[1], sys.argv[2], weights=sys.argv[3] == "weights", progress=lines.append)
    result = {"folder": str(source.folder), "files": [path.name for path in source.weight_files],
              "format": source.format, "revision": source.revision}
except TridentError as error:
    result = {"error": type(error).__name__, "message": error.message}
print(json.dumps({"lines": lines, **result}))
"""


@pytest.fixture
def hub() -> Any:
    """A hub with one model of each kind."""
    shards = {"model-1.safetensors": b"a" * 100, "model-2.safetensors": b"b" * 100}
    rest = {"README.md": b"x", "consolidated.safetensors": b"c", "pytorch_model.bin": b"p", "tokenizer.json": b"{}"}
    first = {"config.json": CONFIG, "model.safetensors.index.json": INDEX, **shards, **rest}
    second = {"config.json": CONFIG, "model.safetensors": b"new", "original/model.safetensors": b"no"}
    repos = {
        "org/model": FakeRepo({COMMIT: first, OTHER_COMMIT: second}, {"main": COMMIT, "v2": OTHER_COMMIT}),
        "org/private": FakeRepo({COMMIT: second}, token="secret"),
        "org/gated": FakeRepo({COMMIT: second}, token="secret", gated=True),
        "org/gguf": FakeRepo({COMMIT: {"README.md": b"x", "model.Q8_0.gguf": b"GGUF"}}),
        "org/ggufs": FakeRepo({COMMIT: {"model.Q8_0.gguf": b"GGUF", "model.Q4_0.gguf": b"GGUF"}}),
        "org/pickled": FakeRepo({COMMIT: {"config.json": CONFIG, "pytorch_model.bin": b"p"}}),
    }
    with FakeHub(repos) as server:
        yield server


class Client:
    """Resolves models in processes of their own that share one cache."""

    def __init__(self, endpoint: str, cache: Path) -> None:
        self._env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }

    def resolve(self, model: str, revision: str = "", *, weights: bool = True, **env: str) -> dict[str, Any]:
        command = [sys.executable, "-c", CHILD, model, revision, "weights" if weights else ""]
        done = subprocess.run(command, env={**self._env, **env}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def client(hub: FakeHub, tmp_path: Path) -> Client:
    return Client(hub.endpoint, tmp_path)


def test_only_needed_files_are_downloaded_and_then_cached(hub: FakeHub, client: Client) -> None:
    result = client.resolve("org/model")
    assert result["files"] == ["model-1.safetensors", "model-2.safetensors"]
    assert (result["format"], result["revision"]) == ("safetensors", COMMIT)
    assert sorted(hub.downloads()) == [
        "config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    assert any("org/model" in line for line in result["lines"])
    again = client.resolve("org/model")
    assert again["folder"] == result["folder"] and len(hub.downloads()) == 5
    assert client.resolve("org/model", HF_HUB_OFFLINE="1")["folder"] == result["folder"]


@pytest.mark.parametrize("revision", ["v2", OTHER_COMMIT])
def test_revision_is_a_branch_or_a_commit(client: Client, revision: str) -> None:
    result = client.resolve("org/model", revision)
    assert (result["revision"], result["files"]) == (OTHER_COMMIT, ["model.safetensors"])
    assert (Path(result["folder"]) / "model.safetensors").read_bytes() == b"new"
    offline = client.resolve("org/model", revision, HF_HUB_OFFLINE="1")
    assert offline["folder"] == result["folder"]


def test_interrupted_download_resumes_where_it_stopped(hub: FakeHub, client: Client) -> None:
    content = random.Random(0).randbytes(24 * 2**20)
    hub.repos["org/model"].commits[COMMIT]["model-2.safetensors"] = content
    hub.interrupted.add("model-2.safetensors")
    result = client.resolve("org/model")
    assert (Path(result["folder"]) / "model-2.safetensors").read_bytes() == content
    ranges = [seen.range for seen in hub.requests if seen.method == "GET" and "model-2" in seen.path]
    # huggingface_hub keeps whole chunks of 10 MiB of the 12 MiB that came.
    assert ranges == [None, f"bytes={10 * 2**20}-"]


def test_bytes_are_reported_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_SECONDS_BETWEEN_REPORTS", 0.0)
    lines: list[str] = []
    bar_class = hub_module._reporting_bar(lines.append)
    with bar_class(unit="B", total=3_000_000, disable=True) as byte_bar, bar_class(total=3, disable=True) as file_bar:
        byte_bar.update(1_000_000)
        file_bar.update(1)
        byte_bar.update(1_000_000)
    assert lines == ["downloaded 1 of 3 MB", "downloaded 2 of 3 MB"]


def test_weights_are_left_alone_when_not_wanted(hub: FakeHub, client: Client) -> None:
    assert client.resolve("org/model", weights=False)["files"] == []
    assert not [name for name in hub.downloads() if name.startswith("model-")]


def test_gguf_only_repository(client: Client) -> None:
    result = client.resolve("org/gguf")
    assert (result["files"], result["format"]) == (["model.Q8_0.gguf"], "gguf")


@pytest.mark.parametrize("model", ["org/private", "org/gated"])
def test_without_access_the_token_is_named(client: Client, model: str) -> None:
    result = client.resolve(model)
    assert result["error"] == "LoadFailed"
    assert "HF_TOKEN" in result["message"] and model in result["message"]
    assert client.resolve(model, HF_TOKEN="secret")["files"] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("model", "revision", "error", "words"),
    [
        ("org/nothing", "", "NotFound", ["org/nothing", "main", "neither a local folder"]),
        ("org/model", "v9", "NotFound", ["org/model", "v9", "no such revision"]),
        ("org/ggufs", "", "BadRequest", ["model.Q8_0.gguf", "model.Q4_0.gguf"]),
        ("org/pickled", "", "BadRequest", ["pytorch_model.bin", "safetensors"]),
        ("no model!", "", "BadRequest", ["no model!", "Hugging Face id"]),
    ],
)
def test_what_cannot_be_had_is_named(client: Client, model: str, revision: str, error: str, words: list[str]) -> None:
    result = client.resolve(model, revision)
    assert result["error"] == error
    assert all(word in result["message"] for word in words), result["message"]


def test_offline_without_cache_says_so(client: Client) -> None:
    result = client.resolve("org/model", HF_HUB_OFFLINE="1")
    assert result["error"] == "NotFound"
    assert "offline mode is on (HF_HUB_OFFLINE)" in result["message"]


def test_no_connection(tmp_path: Path) -> None:
    with FakeHub({}) as closed:
        endpoint = closed.endpoint
    result = Client(endpoint, tmp_path).resolve("org/model")
    assert result["error"] == "LoadFailed"
    assert endpoint in result["message"] and "failed" in result["message"]
