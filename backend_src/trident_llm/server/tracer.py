"""OpenTelemetry spans of requests that come with a trace: the whole request, and in it queue, prefill and decode.

Spans are made when a request has ended, by a thread of their own, and exported in batches by the SDK's. To be imported
only where spans are wanted: OpenTelemetry is an optional extra.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .tracing import RequestTrace

logger = logging.getLogger(__name__)

EXPORT_SECONDS = 2.0
"""That the collector may take for a batch."""
BATCH_MS = 1000
"""How long ended spans wait for others."""
CLOSE_SECONDS = 1.0
"""That the last spans may take to leave when a door ends."""
_SIGNAL_PATH = "/v1/traces"


class Tracer:
    """Exports to the collector at ``otlp_endpoint``; without a path that is OTLP's usual one."""

    def __init__(self, otlp_endpoint: str, model: str) -> None:
        has_path = urlsplit(otlp_endpoint).path.strip("/")
        endpoint = otlp_endpoint if has_path else otlp_endpoint.rstrip("/") + _SIGNAL_PATH
        resource = Resource.create({"service.name": "trident", "gen_ai.request.model": model})
        # Without a parent that is sampled there is no span.
        sampler = ParentBased(ALWAYS_OFF)
        self._provider = TracerProvider(resource=resource, sampler=sampler, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=BATCH_MS))
        self._tracer = self._provider.get_tracer("trident_llm")
        self._traces: queue.SimpleQueue[RequestTrace | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def add(self, trace: RequestTrace) -> None:
        """Returns at once."""
        self._traces.put(trace)

    def close(self) -> None:
        """Export what there is; given up after ``CLOSE_SECONDS``."""
        self._traces.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (trace := self._traces.get()) is not None:
            try:
                self._make_spans(trace)
            except Exception:
                logger.exception("the spans of a request could not be made")
        self._provider.shutdown()

    def _make_spans(self, trace: RequestTrace) -> None:
        epoch = time.time() - time.monotonic()

        def nanoseconds(moment: float) -> int:
            return int((moment + epoch) * 1e9)

        parent = TraceContextTextMapPropagator().extract(dict(trace.context))
        request = self._tracer.start_span(
            "llm_request",
            context=parent,
            kind=SpanKind.SERVER,
            attributes=dict(trace.attributes),
            start_time=nanoseconds(trace.requested_at),
        )
        if trace.error:
            request.set_status(Status(StatusCode.ERROR, trace.error))
        inside = set_span_in_context(request, parent)
        for name, begin, end in trace.phases():
            span = self._tracer.start_span(name, context=inside, start_time=nanoseconds(begin))
            span.end(end_time=nanoseconds(end))
        request.end(end_time=nanoseconds(trace.ended_at))
