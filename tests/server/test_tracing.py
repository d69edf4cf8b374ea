"""Spans of requests that are part of a trace, as a collector gets them."""

from __future__ import annotations

import json
import sys

import msgspec
import pytest

from tests.fakes.engine_runs import wait_until
from tests.fakes.fake_backend_utils import Request
from tests.fakes.fake_collector import FakeCollector
from trident_llm.config import EngineConfig
from trident_llm.errors import BadRequest, LoadFailed
from trident_llm.options import VLLM_DEFAULTS
from trident_llm.server.request import RequestReader
from trident_llm.server.streaming import StreamingDoor
from trident_llm.server.tracer import Tracer
from trident_llm.server.tracing import RequestTrace, check_tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


def attributes(span) -> dict[str, object]:
    """Of a span, strings and numbers alone."""
    return {item.key: item.value.string_value or item.value.int_value for item in span.attributes}


def test_spans_of_a_request(open_door):
    client = open_door().client
    with FakeCollector() as collector:
        client.events.tracer = Tracer(collector.url, "the-model")
        reader = RequestReader(msgspec.structs.replace(client.welcome, otlp_endpoint=collector.url), VLLM_DEFAULTS)
        door = StreamingDoor(client, reader)
        plain = Request("hello", options={"max_tokens": 5})
        unsampled = Request("hello", options={"max_tokens": 5, "traceparent": TRACEPARENT[:-1] + "0"})
        traced = Request("hello", options={"max_tokens": 20, "traceparent": TRACEPARENT}, client_id="mine")
        for request in (plain, unsampled, traced):
            door.execute([request])
        wait_until(lambda: all(request.sender.is_final for request in (plain, unsampled, traced)))
        door.close()
        client.events.tracer.close()
        spans = dict(collector.spans)
    assert collector.paths == {"/v1/traces"}
    assert spans.keys() == {"llm_request", "queue", "prefill", "decode"}
    request = spans["llm_request"]
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    expected = {"gen_ai.usage.input_tokens": 5, "gen_ai.usage.output_tokens": 20, "trident.client_id": "mine"}
    assert attributes(request).items() >= expected.items()
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    assert {phase.parent_span_id for phase in phases} == {request.span_id}
    times = [request.start_time_unix_nano, *(phase.end_time_unix_nano for phase in phases)]
    assert times == sorted(times) and times[-1] == request.end_time_unix_nano
    assert [phase.start_time_unix_nano for phase in phases] == times[:-1]


def test_the_servers_own_span_goes_before_the_clients(open_door):
    client = open_door().client
    own = {"traceparent": TRACEPARENT.replace(PARENT, "1" * 16)}
    request = Request("hello", options={"traceparent": TRACEPARENT}, trace_context=json.dumps(own))
    for endpoint, expected in (("http://collector:4318", own), ("", None)):
        welcome = msgspec.structs.replace(client.welcome, otlp_endpoint=endpoint)
        assert RequestReader(welcome, VLLM_DEFAULTS).read(request).trace_context == expected


def test_a_request_has_the_phases_that_it_reached():
    def phases(started_at: float, first_token_at: float) -> list[str]:
        trace = RequestTrace({}, 1.0, started_at, first_token_at, 9.0, {})
        assert (trace.phases()[0][1], trace.phases()[-1][2]) == (1.0, 9.0)
        return [name for name, _, _ in trace.phases()]

    assert phases(0.0, 0.0) == ["queue"]
    assert phases(2.0, 0.0) == ["queue", "prefill"]
    assert phases(2.0, 3.0) == ["queue", "prefill", "decode"]


def test_a_missing_package_fails_the_load(monkeypatch: pytest.MonkeyPatch):
    check_tracing("http://localhost:4318")
    monkeypatch.delitem(sys.modules, "trident_llm.server.tracer")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    check_tracing("")
    with pytest.raises(LoadFailed, match=r"'http://localhost:4318' needs packages.*trident-llm\[tracing\]"):
        check_tracing("http://localhost:4318")


def test_an_endpoint_is_a_url():
    with pytest.raises(BadRequest, match="otlp_endpoint: 'localhost:4318' is not allowed; give a URL"):
        EngineConfig(model="m", otlp_endpoint="localhost:4318")
