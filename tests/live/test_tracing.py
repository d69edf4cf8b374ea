"""Traces and the log of requests through a real server: headers of gRPC streams, fields of HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fakes.engine_runs import wait_until
from tests.fakes.fake_collector import FakeCollector
from tests.live.live_server import serve_fake
from tests.live.requests import GrpcStream, generate

pytestmark = pytest.mark.live
TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"
SETTINGS = ("--set", "log_format=json", "--set", "log_level=debug", "--set", "max_queue_size=32", "--doors", "1")


def test_spans_and_lines_of_requests(tmp_path: Path):
    with FakeCollector() as collector:
        endpoint = f"otlp_endpoint={collector.url}"
        with serve_fake(tmp_path, "--set", endpoint, *SETTINGS) as server:
            assert generate(server, "llm_vllm", "hello", max_tokens=5, traceparent=TRACEPARENT).status == 200
            wait_until(lambda: "llm_request" in collector.spans)
            assert collector.spans["llm_request"].trace_id.hex() == TRACE
            collector.spans.clear()
            with GrpcStream(server, "llm", headers={"traceparent": TRACEPARENT}) as stream:
                stream.submit("hello", request_id="my request", stream=True, max_tokens=5)
                stream.until_final()
            wait_until(lambda: len(collector.spans) == 4)
            assert {span.trace_id.hex() for span in collector.spans.values()} == {TRACE}
            lines = [line for line in server.run.log.read_text().splitlines() if line.startswith("{")]
    events = [line for line in map(json.loads, lines) if line.get("client_id") == "my request"]
    door, engine = "trident_llm.server.request_events", "trident_llm.engine.loop"
    found = [(line["logger"], line["message"].removeprefix("request ")) for line in events]
    assert sorted(found) == [(engine, "accepted"), (engine, "finished"), (door, "accepted"), (door, "finished")]
    assert len({line["request_id"] for line in events}) == 1
