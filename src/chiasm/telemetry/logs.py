"""Structured logs: one JSON object a line on stderr, whoever writes it, request id by context."""

from __future__ import annotations

import logging
import sys

import structlog
from opentelemetry import trace
from structlog.typing import EventDict, Processor, WrappedLogger


def configure(service: str, *, level: str = "info") -> None:
    """Sets structlog up for one process; every line carries `service`.

    Libraries that use `logging`, asyncio and grpc among them, write the same lines, from `warning`
    on.
    """
    threshold = logging.getLevelNamesMapping()[level.upper()]
    fields: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _Service(service),
        _add_trace_id,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[Processor] = [
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ]
    structlog.configure(
        processors=[*fields, *render],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*fields, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(threshold, logging.WARNING), force=True)
    logging.captureWarnings(True)


class _Service:
    """Adds the service's name: to the lines of threads too, which have a context of their own."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, logger: WrappedLogger, method: str, line: EventDict) -> EventDict:
        line["service"] = self._name
        return line


def _add_trace_id(logger: WrappedLogger, method: str, line: EventDict) -> EventDict:
    """Adds the id of the trace in whose context a line is written."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        line["trace_id"] = trace.format_trace_id(context.trace_id)
    return line
