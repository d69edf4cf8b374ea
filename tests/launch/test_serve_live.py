"""scripts/serve as a user runs it: the default model, its answer, and an end that leaves nothing."""

from __future__ import annotations

import http.client
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.helpers import END_SECONDS, ROOT, Launch

pytestmark = pytest.mark.live


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Launch]:
    launch = Launch(tmp_path, [str(ROOT / "scripts/serve"), "--set", "max_model_len=2048"])
    yield launch
    launch.close()


def test_it_answers_and_leaves_nothing(serve: Launch) -> None:
    connection = serve.endpoint(seconds=90)
    assert "loading weights" in serve.output
    assert "> What is the capital of France?\nThe capital of France is Paris.\n(" in serve.output
    options = {"text_input": "The capital of France is", "max_tokens": 16, "temperature": 0}
    connection.request("POST", "/v2/models/llm/generate", json.dumps(options))
    assert "Paris" in json.loads(connection.getresponse().read())["text_output"]
    running = start_endless_stream(serve)
    assert serve.end(signal.SIGINT) < END_SECONDS
    assert serve.process.returncode == 0 and serve.leftovers() == []
    running.close()
    connection.close()


def start_endless_stream(serve: Launch) -> http.client.HTTPConnection:
    """A request that is still under way when this returns."""
    connection = serve.endpoint()
    options = {"text_input": "Once upon a time", "stream": True, "ignore_eos": True, "max_tokens": 1500}
    connection.request("POST", "/v2/models/llm/generate_stream", json.dumps(options))
    assert connection.getresponse().read(10)
    time.sleep(0.5)
    return connection
