"""An OTLP receiver in the test's own process, and the spans it got as plain values."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

WAIT_S = 30.0
QUIET_S = 0.5
"""A trace to which nothing was added for this long is complete; exporters send more often."""

ENVIRONMENT = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}


@dataclass(frozen=True, kw_only=True)
class Span:
    """As it came over the wire; ids in hexadecimal, `parent_id` empty for a root."""

    service: str
    instance: str
    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    is_error: bool
    links: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        return f"{self.service.removeprefix('chiasm-')}: {self.name}"


class Trace:
    """The spans of one trace."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self.spans = sorted(spans, key=lambda span: span.start_ns)
        self._by_id = {span.span_id: span for span in self.spans}

    @property
    def roots(self) -> list[Span]:
        return [span for span in self.spans if not span.parent_id]

    @property
    def orphans(self) -> list[Span]:
        return [s for s in self.spans if s.parent_id and s.parent_id not in self._by_id]

    @property
    def edges(self) -> set[tuple[str, str]]:
        """Labels of parents and their children."""
        return {(parent.label, child.label) for parent, child in self.pairs()}

    def pairs(self) -> Iterator[tuple[Span, Span]]:
        """Parents and their children."""
        for span in self.spans:
            if span.parent_id in self._by_id:
                yield self._by_id[span.parent_id], span

    def named(self, label: str) -> list[Span]:
        return [span for span in self.spans if span.label == label]

    def one(self, label: str) -> Span:
        (span,) = self.named(label)
        return span


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._changed = time.monotonic()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._lock:
            self._spans.extend(spans_of(request))
            self._changed = time.monotonic()
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[Span]:
        """All so far."""
        with self._lock:
            return list(self._spans)

    def trace(
        self, is_it: Callable[[Span], bool], until: Callable[[Trace], object] = lambda _: True
    ) -> Trace:
        """The trace that holds such a span, once it is whole; fails after WAIT_S.

        until: what it must have besides, as a busy process may be silent for longer than QUIET_S. A
        trace that does not come to it is returned after WAIT_S, so that the test tells what is
        missing.
        """
        end = time.monotonic() + WAIT_S
        while True:
            is_late = time.monotonic() >= end
            ids = {span.trace_id for span in filter(is_it, self.spans())}
            assert len(ids) <= 1, f"in {len(ids)} traces"
            trace = Trace(span for span in self.spans() if span.trace_id in ids)
            is_whole = trace.roots and not trace.orphans
            is_quiet = time.monotonic() > self._changed + QUIET_S
            if is_whole and is_quiet and (is_late or until(trace)):
                return trace
            if is_late:
                break
            time.sleep(0.05)
        spans = "\n".join(sorted({span.label for span in self.spans()}))
        raise AssertionError(f"not there or not whole after {WAIT_S} s; there are\n{spans}")

    def trace_of(self, request_id: str, until: Callable[[Trace], object] = lambda _: True) -> Trace:
        """The trace of a request."""
        return self.trace(lambda s: s.attributes.get("gen_ai.response.id") == request_id, until)


def spans_of(request: trace_service_pb2.ExportTraceServiceRequest) -> Iterator[Span]:
    """The spans of an export."""
    for resource in request.resource_spans:
        about = _values(resource.resource.attributes)
        for scope in resource.scope_spans:
            for wire in scope.spans:
                yield Span(
                    service=about["service.name"],
                    instance=about.get("service.instance.id", ""),
                    trace_id=wire.trace_id.hex(),
                    span_id=wire.span_id.hex(),
                    parent_id=wire.parent_span_id.hex(),
                    name=wire.name,
                    kind=trace_pb2.Span.SpanKind.Name(wire.kind).removeprefix("SPAN_KIND_"),
                    start_ns=wire.start_time_unix_nano,
                    end_ns=wire.end_time_unix_nano,
                    attributes=_values(wire.attributes),
                    is_error=wire.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
                    links=tuple((li.trace_id.hex(), li.span_id.hex()) for li in wire.links),
                )


@contextmanager
def collecting() -> Iterator[tuple[Collector, dict[str, str]]]:
    """A running receiver and the environment that makes processes export to it."""
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    endpoint = f"http://127.0.0.1:{port}"
    try:
        yield collector, ENVIRONMENT | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    finally:
        server.stop(None)


def _values(attributes: Iterable[common_pb2.KeyValue]) -> dict[str, Any]:
    return {entry.key: _value(entry.value) for entry in attributes}


def _value(value: common_pb2.AnyValue) -> Any:
    if value.WhichOneof("value") == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, value.WhichOneof("value") or "string_value")
