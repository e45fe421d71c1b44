"""The span exporter that the standard OTEL_* variables describe.

What these variables leave open, sampling, batching, headers, certificates and time-outs, the SDK
reads for itself. A variable that is empty counts as unset, as the specification has it.
"""

from __future__ import annotations

import logging
import os
from urllib.parse import urlsplit

from opentelemetry.sdk.trace.export import SpanExporter

GRPC, HTTP = "grpc", "http/protobuf"
HTTP_PATH = "/v1/traces"

log = logging.getLogger(__name__)


def exporter() -> SpanExporter | None:
    """The exporter; None when no endpoint is named or tracing is switched off.

    Raises ValueError, with the variable in its text, for a value that cannot be used.
    """
    variable = _first("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if not variable or _value("OTEL_SDK_DISABLED").lower() == "true":
        return None
    if _value("OTEL_TRACES_EXPORTER") == "none":
        return None
    protocol = _first("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    match _value(protocol) or GRPC:
        case "grpc":
            return _grpc(variable)
        case "http/protobuf":
            return _http(variable)
        case other:
            raise ValueError(f"{protocol}={other!r}: use {GRPC} or {HTTP}")


def _grpc(variable: str) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    endpoint = _value(variable)
    scheme, port, _ = _parts(variable, allowed=("http", "https", ""))
    if scheme != "https" and port is None:
        raise ValueError(f"{variable}={endpoint!r} names no port")
    if not scheme and _value("OTEL_EXPORTER_OTLP_INSECURE").lower() != "true":
        log.warning("%s=%r has no scheme: TLS is used, http:// means none", variable, endpoint)
    return OTLPSpanExporter(endpoint=endpoint)


def _http(variable: str) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    endpoint = _value(variable)
    _, _, path = _parts(variable, allowed=("http", "https"))
    if variable == "OTEL_EXPORTER_OTLP_ENDPOINT":
        endpoint = endpoint.rstrip("/") + HTTP_PATH
    elif path in ("", "/"):
        # The specification takes this variable as it is; collectors answer 404 to that.
        log.warning("%s=%r has no path; collectors listen at %s", variable, endpoint, HTTP_PATH)
    return OTLPSpanExporter(endpoint=endpoint)


def _parts(variable: str, *, allowed: tuple[str, ...]) -> tuple[str, int | None, str]:
    """Scheme, port and path of an endpoint."""
    endpoint = _value(variable)
    try:
        parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{variable}={endpoint!r}: {error}") from None
    has_space = any(character.isspace() for character in endpoint)
    if parts.scheme not in allowed or not parts.hostname or has_space:
        raise ValueError(f"{variable}={endpoint!r} is not of the form http://host:port")
    return parts.scheme, port, parts.path


def _first(*variables: str) -> str:
    """The first of the variables that is set; empty when none is."""
    return next((variable for variable in variables if _value(variable)), "")


def _value(variable: str) -> str:
    return os.environ.get(variable, "").strip()
