"""OpenTelemetry tracing, set up from the standard OTEL_* variables; W3C context over grpc metadata.

Without OTEL_EXPORTER_OTLP_ENDPOINT (or its _TRACES_ form) nothing is exported and spans cost next
to nothing; the context of a caller is passed on all the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.util.types import AttributeValue

from chiasm import errors
from chiasm.telemetry import otlp

Metadata = tuple[tuple[str, str], ...]
Attributes = Mapping[str, AttributeValue]

CLIENT, SERVER, INTERNAL = trace.SpanKind.CLIENT, trace.SpanKind.SERVER, trace.SpanKind.INTERNAL

CANCELLED = "chiasm.cancelled"
"""The attribute of spans whose work was given up because nobody wanted it any more."""

MAX_MESSAGE_CHARS = 256
"""Of an error's message, this much is kept in a span's status."""

PROPAGATORS = "OTEL_PROPAGATORS"

tracer = trace.get_tracer("chiasm")
log = logging.getLogger(__name__)


def _drop_unknown_propagators() -> str:
    """What is wrong with OTEL_PROPAGATORS; the variable is gone then.

    opentelemetry.propagate reads it when it is imported, and fails for a name it does not find: not
    even `--help` would be left. So it is looked at first, and that module imported late.
    """
    if PROPAGATORS not in os.environ:
        return ""
    names = [name.strip() for name in os.environ[PROPAGATORS].split(",")]
    known = entry_points(group="opentelemetry_propagator").names
    unknown = [name for name in names if name and name != "none" and name not in known]
    if not unknown:
        return ""
    del os.environ[PROPAGATORS]
    return f"{PROPAGATORS} names what is not installed: {', '.join(unknown)}; the default is used"


_WRONG_PROPAGATORS = _drop_unknown_propagators()


def configure(service: str, *, instance_id: str) -> TracerProvider | None:
    """Installs an OTLP exporter if the environment names an endpoint; returns its provider.

    Whatever the environment says, the process goes on: what cannot be used is logged in one line
    and leaves tracing off. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over the defaults.
    """
    if _WRONG_PROPAGATORS:
        log.error(_WRONG_PROPAGATORS)
    try:
        exporter = otlp.exporter()
        if exporter is None:
            return None
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        defaults = {"service.name": f"chiasm-{service}", "service.instance.id": instance_id}
        resource = Resource.create(defaults).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(exporter))
    except Exception as error:
        # Whatever the SDK makes of its variables, it must not keep a service from starting.
        log.error("tracing is off: %s", error)
        return None
    trace.set_tracer_provider(provider)
    return provider


def inject(span: trace.Span | None = None) -> dict[str, str]:
    """The context, with `span` or the current one, as traceparent/tracestate; empty for none."""
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    context = trace.set_span_in_context(span) if span is not None else None
    propagate.inject(carrier, context=context)
    return carrier


def extract(carrier: Mapping[str, str]) -> otel_context.Context:
    """The context that traceparent/tracestate in `carrier` stand for."""
    from opentelemetry import propagate

    return propagate.extract(carrier)


@contextmanager
def span(
    name: str,
    *,
    kind: trace.SpanKind = INTERNAL,
    context: otel_context.Context | None = None,
    attributes: Attributes | None = None,
) -> Iterator[trace.Span]:
    """A span that is current in the block and ends with it; an error that leaves it marks it."""
    with tracer.start_as_current_span(
        name,
        context=context,
        kind=kind,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as started:
        try:
            yield started
        except BaseException as error:
            mark_failed(started, error)
            raise


@contextmanager
def child(
    name: str, *, kind: trace.SpanKind, attributes: Attributes | None = None
) -> Iterator[trace.Span]:
    """A span under the current one; where nothing is recorded, it costs a look-up."""
    if not trace.get_current_span().is_recording():
        yield trace.INVALID_SPAN
        return
    with span(name, kind=kind, attributes=attributes) as started:
        yield started


def begin_child(
    name: str, *, kind: trace.SpanKind, attributes: Attributes | None = None
) -> trace.Span:
    """A span under the current one, which the caller ends; where nothing is recorded, none."""
    if not trace.get_current_span().is_recording():
        return trace.INVALID_SPAN
    return tracer.start_span(name, kind=kind, attributes=attributes)


@contextmanager
def remote_child(
    name: str, carrier: Mapping[str, str], *, kind: trace.SpanKind
) -> Iterator[trace.Span]:
    """A span under the remote one in `carrier`; without one, nothing is recorded."""
    from opentelemetry import propagate

    context = propagate.extract(carrier, context=otel_context.Context())
    if not trace.get_current_span(context).get_span_context().is_valid:
        yield trace.INVALID_SPAN
        return
    with span(name, context=context, kind=kind) as started:
        yield started


def mark_failed(span: trace.Span, error: BaseException) -> None:
    """Gives a span the status and error.type of an error.

    Work that is no longer wanted has not failed: a cancelled span is marked as cancelled only.
    """
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        span.set_attribute(CANCELLED, True)
        return
    kind = error.reason if isinstance(error, errors.ChiasmError) else type(error).__qualname__
    span.set_attribute("error.type", kind)
    span.set_status(trace.StatusCode.ERROR, str(error)[:MAX_MESSAGE_CHARS])


def peer(address: str) -> dict[str, str | int]:
    """The attributes that name the server at host:port."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return {"server.address": address}
    return {"server.address": host.strip("[]"), "server.port": int(port)}


def metadata(request_id: str) -> Metadata:
    """grpc metadata of an outgoing call: the trace context and the request id."""
    return (*inject().items(), ("x-request-id", request_id))
