"""What the two clients share: limits, defaults, and the span and metadata of a call."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterator

import grpc
from opentelemetry.trace import Span

from chiasm import errors
from chiasm.client.codec import Options
from chiasm.client.events import Event, Finished, Started
from chiasm.client.messages import Prompt, Tokens
from chiasm.telemetry import traces
from chiasm.transport import status

DEFAULT_TIMEOUT_S = 600.0
"""Bound of a generation for which the caller gives none."""

SHORT_TIMEOUT_S = 30.0
"""Bound of the calls that generate nothing."""

RESUME_TIMEOUT_S = 10.0
"""How long a stream that broke off looks for a gateway."""

MAX_MESSAGE_BYTES = 512 * 1024 * 1024
"""Bound of one message. The gateway's own bound is tighter and is the one that counts."""

SERVICE = "chiasm.v1.Inference"
_POLL_S = 0.1


def bound_s(given: float | None, default: float) -> float:
    """Bound of a call in seconds: the caller's own, or the client's."""
    return default if given is None else given


def new_request_id(request_id: str) -> str:
    """The caller's id, or a fresh one: the same id then stands in request, metadata and logs."""
    return request_id or uuid.uuid4().hex


def metadata(request_id: str, credentials: traces.Metadata) -> traces.Metadata:
    """Metadata of a call. An id that cannot travel in metadata is left to the gateway to refuse."""
    fits = request_id.isascii() and request_id.isprintable()
    context = traces.metadata(request_id) if fits else tuple(traces.inject().items())
    return (*context, *credentials)


def credentials(api_key: str) -> traces.Metadata:
    """The metadata that shows an API key; none without a key.

    Raises InvalidArgument for a key that cannot travel in metadata.
    """
    if not (api_key.isascii() and api_key.isprintable()):
        raise errors.InvalidArgument("api_key", "must be printable ASCII")
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def check_open(is_closed: bool) -> None:
    """Raises FailedPrecondition for a closed client: grpc would wait for ever, abort the process or
    raise a ValueError."""
    if is_closed:
        raise errors.FailedPrecondition("the client is closed")


@contextlib.contextmanager
def rpc_errors(endpoint: str) -> Iterator[None]:
    """Failed calls leave as chiasm.errors, those that `close` ends too."""
    try:
        yield
    except grpc.RpcError as error:
        raise status.from_rpc_error(error, endpoint) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise errors.Unavailable("the client was closed") from None


def start_span(prompt: Prompt, options: Options) -> Span:
    """The client span of a generation; the caller ends it with `ending`."""
    operation = "text_completion" if isinstance(prompt, Tokens) else "chat"
    span = traces.tracer.start_span(
        f"{operation} {options.model}".strip(),
        kind=traces.CLIENT,
        attributes={
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "chiasm",
            "gen_ai.request.stream": True,
            "gen_ai.request.max_tokens": options.sampling.max_tokens,
        },
    )
    if options.model:
        span.set_attribute("gen_ai.request.model", options.model)
    return span


def record(span: Span, event: Event) -> None:
    """Notes on the span of a generation what an event of it says."""
    match event:
        case Started():
            span.set_attribute("gen_ai.response.id", event.request_id)
            span.set_attribute("gen_ai.response.model", event.model)
        case Finished():
            span.set_attribute("gen_ai.response.finish_reasons", [event.reason])
            span.set_attribute("gen_ai.usage.input_tokens", event.usage.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", event.usage.completion_tokens)
            cached = event.usage.cached_tokens
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", cached)


@contextlib.contextmanager
def ending(span: Span) -> Iterator[None]:
    """Ends the span with the block, marked with the error that left it."""
    try:
        yield
    except BaseException as error:
        traces.mark_failed(span, error)
        raise
    finally:
        span.end()


class Polls:
    """Paces `wait_ready`: how long to sleep and when to give up."""

    def __init__(self, timeout_s: float, endpoint: str) -> None:
        self._end_s = time.monotonic() + timeout_s
        self._timeout_s, self._endpoint = timeout_s, endpoint
        self._last: errors.ChiasmError | None = None

    def left_s(self) -> float:
        """Seconds for the next try. Raises Unavailable when there are none."""
        left = self._end_s - time.monotonic()
        if left <= 0:
            cause = f": {self._last}" if self._last else ""
            raise errors.Unavailable(
                f"{self._endpoint} was not ready within {self._timeout_s:g} s{cause}",
                retry_after_s=1.0,
            )
        return left

    def failed(self, error: grpc.RpcError) -> None:
        """A try that did not reach it. Raises Unauthenticated: no other try would do better."""
        found = status.from_rpc_error(error)
        if isinstance(found, errors.Unauthenticated):
            raise found from None
        # The last try is cut short by the end of the time, which tells nothing.
        if self._last is None or not isinstance(found, errors.DeadlineExceeded):
            self._last = found

    def pause_s(self) -> float:
        """Seconds to sleep before the next try."""
        return min(_POLL_S, self.left_s())
