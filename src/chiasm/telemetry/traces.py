"""OpenTelemetry tracing, set up from the standard OTEL_* variables; W3C context over grpc metadata.

Without OTEL_EXPORTER_OTLP_ENDPOINT (or its _TRACES_ form) nothing is exported and spans cost next
to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.util.types import AttributeValue

Metadata = tuple[tuple[str, str], ...]

CLIENT, SERVER = trace.SpanKind.CLIENT, trace.SpanKind.SERVER

tracer = trace.get_tracer("chiasm")


def configure(service: str, *, instance_id: str) -> TracerProvider | None:
    """Installs an OTLP exporter if the environment names an endpoint; returns its provider."""
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not any(os.environ.get(name) for name in names):
        return None
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {"service.name": f"chiasm-{service}", "service.instance.id": instance_id}
    )
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider


def inject() -> dict[str, str]:
    """The current context as traceparent/tracestate; empty when nothing is recorded."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


def extract(carrier: Mapping[str, str]) -> otel_context.Context:
    """The context that traceparent/tracestate in `carrier` stand for."""
    return propagate.extract(carrier)


@contextmanager
def remote_child(
    name: str, carrier: Mapping[str, str], *, kind: trace.SpanKind
) -> Iterator[trace.Span]:
    """A span under the remote one in `carrier`; without one, nothing is recorded."""
    if not carrier.get("traceparent"):
        yield trace.INVALID_SPAN
        return
    with tracer.start_as_current_span(name, context=extract(carrier), kind=kind) as span:
        yield span


@contextmanager
def child(
    name: str, *, kind: trace.SpanKind, attributes: Mapping[str, AttributeValue] | None = None
) -> Iterator[trace.Span]:
    """A span under the current one; where nothing is recorded, it costs a look-up."""
    if not trace.get_current_span().is_recording():
        yield trace.INVALID_SPAN
        return
    with tracer.start_as_current_span(name, kind=kind, attributes=attributes) as span:
        yield span


def metadata(request_id: str) -> Metadata:
    """grpc metadata of an outgoing call: the trace context and the request id."""
    return (*inject().items(), ("x-request-id", request_id))
