"""One server interceptor: request id and trace context in, typed errors out, every call counted."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import structlog
from opentelemetry import context as otel_context

from chiasm import errors
from chiasm.telemetry import metrics, traces
from chiasm.transport import status

REQUEST_ID_KEY = "x-request-id"
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""The ids that requests may have; they travel as metadata, hence the alphabet."""

MESSAGE_TIMEOUT_S = 600.0
"""How long the message of a call may take: it may hold large media, and the line may be slow."""

_QUIET = ("/grpc.health.v1.Health/", "/grpc.reflection.")
log = structlog.get_logger()

if TYPE_CHECKING:
    # Generic in the published types only.
    Interceptor = grpc.aio.ServerInterceptor[Any, Any]
    _Context = grpc.aio.ServicerContext[Any, Any]
else:
    Interceptor = grpc.aio.ServerInterceptor
    _Context = grpc.aio.ServicerContext


def request_id() -> str:
    """The id of the request that the current call belongs to; empty outside of calls."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


class CallInterceptor(Interceptor):
    """Wraps every handler of a server.

    Handlers are coroutines (unary answer) or async generators (streamed answer). A ChiasmError
    becomes its status; any other exception becomes INTERNAL without its text, which is logged. A
    call of one message ends with DEADLINE_EXCEEDED if that does not come within
    `message_timeout_s`.
    """

    def __init__(self, *, message_timeout_s: float = MESSAGE_TIMEOUT_S) -> None:
        self._message_timeout_s = message_timeout_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_QUIET):
            return handler
        # To grpc all calls have a stream of messages: it would wait for the only one for ever.
        timeout_s = None if handler.request_streaming else self._message_timeout_s
        if handler.response_streaming:
            behavior = handler.unary_stream or handler.stream_stream
            wrapped = _wrap_stream(behavior, method, timeout_s)
            factory = grpc.stream_stream_rpc_method_handler
        else:
            behavior = handler.unary_unary or handler.stream_unary
            wrapped = _wrap_unary(behavior, method, timeout_s)
            factory = grpc.stream_unary_rpc_method_handler
        return factory(
            wrapped,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


class Guard(Protocol):
    """Has a say about calls of which nothing has been read yet."""

    def check(self, details: grpc.HandlerCallDetails) -> None:
        """Raises what a call that begins is refused with; runs in the call's own task."""


class Guards(Interceptor):
    """Refuses calls before anything of them is read. For what comes after CallInterceptor.

    What one guard refuses those after it do not hear of. A method that does not exist is no matter
    of theirs.
    """

    def __init__(self, *guards: Guard) -> None:
        self._guards = guards

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is not None:
            try:
                for guard in self._guards:
                    guard.check(handler_call_details)
            except errors.ChiasmError as error:
                return _refusal(handler_call_details.method, error)
        return handler


def _refusal(method: str, error: errors.ChiasmError) -> Any:
    """A handler that refuses and reads nothing: a call of one message is a stream of one."""

    async def refuse(_: Any, context: _Context) -> AsyncIterator[Any]:
        if method.startswith(_QUIET):
            await status.abort(context, error)  # nobody else does it for them
        raise error
        yield

    return grpc.stream_stream_rpc_method_handler(refuse)


class _Call:
    """Context of one call: entered before the handler, left after it whatever happens."""

    def __init__(self, method: str, context: _Context) -> None:
        self.method, self.context = method, context
        self.metadata = {k: v for k, v in context.invocation_metadata() or () if isinstance(v, str)}
        self.start = time.monotonic()
        self.outcome = "OK"

    def __enter__(self) -> _Call:
        self.token = otel_context.attach(traces.extract(self.metadata))
        given = self.metadata.get(REQUEST_ID_KEY, "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        structlog.contextvars.bind_contextvars(request_id=request_id)
        return self

    def __exit__(self, *_: object) -> None:
        otel_context.detach(self.token)
        structlog.contextvars.unbind_contextvars("request_id")
        metrics.RPC_SECONDS.labels(self.method, self.outcome).observe(time.monotonic() - self.start)

    async def fail(self, error: Exception) -> None:
        if not isinstance(error, errors.ChiasmError):
            log.exception("rpc_failed", method=self.method)
            error = errors.Internal("internal error; the server's log has the request id")
        else:
            log.info(
                "rpc_refused", method=self.method, reason=error.reason, message=error.message[:256]
            )
        self.outcome = type(error).__name__
        await status.abort(self.context, error)


async def _received(requests: Any, context: _Context, timeout_s: float | None) -> Any:
    """What a handler is called with: the call's one message, or all of them where there is no
    `timeout_s`. Raises DeadlineExceeded, or InvalidArgument where there is no message."""
    if timeout_s is None:
        return requests
    try:
        async with asyncio.timeout(timeout_s):
            message = await context.read()
    except TimeoutError:
        raise errors.DeadlineExceeded(
            f"the call's message did not come within {timeout_s:g} s"
        ) from None
    if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in grpc's stubs
        raise errors.InvalidArgument("", "the call has no message")
    return message


def _wrap_unary(behavior: Any, method: str, timeout_s: float | None) -> Any:
    async def call(requests: Any, context: _Context) -> Any:
        with _Call(method, context) as scope:
            try:
                return await behavior(await _received(requests, context, timeout_s), context)
            except asyncio.CancelledError:
                scope.outcome = "CANCELLED"
                raise
            except grpc.aio.BaseError:  # aborted, or the server has stopped
                raise
            except Exception as error:
                await scope.fail(error)

    return call


def _wrap_stream(behavior: Any, method: str, timeout_s: float | None) -> Any:
    # Not a generator itself: grpc leaves those of cancelled calls to the garbage collector, and
    # what the handler has to clean up would be done later, in another context.
    async def call(requests: Any, context: _Context) -> None:
        with _Call(method, context) as scope:
            try:
                request = await _received(requests, context, timeout_s)
                await _answer(behavior(request, context), context)
            except asyncio.CancelledError:
                scope.outcome = "CANCELLED"
                raise
            except grpc.aio.BaseError:  # aborted, or the server has stopped
                raise
            except Exception as error:
                await scope.fail(error)

    return call


async def _answer(answers: Any, context: _Context) -> None:
    """Writes all answers; the handler has cleaned up when this returns."""
    async with contextlib.aclosing(answers):
        async for answer in answers:
            try:
                await context.write(answer)
            except asyncio.CancelledError as cancelled:
                # The handler, which waits at its yield, may know why: its own deadline.
                with contextlib.suppress(StopAsyncIteration):
                    await answers.athrow(cancelled)
                raise
