"""What a call that ends while its answer is being written says to its peer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from chiasm import errors
from chiasm.transport.interceptors import _wrap_stream

WAIT_S = 10.0


class Context:
    """A call whose peer does not read: its first answer is never written."""

    def __init__(self) -> None:
        self.is_writing = asyncio.Event()
        self.code: grpc.StatusCode | None = None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def trailing_metadata(self) -> tuple[()]:
        return ()

    async def write(self, _: object) -> None:
        self.is_writing.set()
        await asyncio.sleep(WAIT_S)

    async def abort(self, code: grpc.StatusCode, *_: object) -> None:
        self.code = code
        raise grpc.aio.AbortError


async def ended(handler: Any, *, cancel: bool = False) -> Context:
    """The call's context once it is over."""
    context: Any = Context()
    task = asyncio.create_task(_wrap_stream(handler, "/test.Test/Stream", None)(None, context))
    await asyncio.wait_for(context.is_writing.wait(), WAIT_S)
    if cancel:
        task.cancel()
    await asyncio.wait({task}, timeout=WAIT_S)
    assert task.done()
    assert task.cancelled() or isinstance(task.exception(), grpc.aio.AbortError)
    return context  # type: ignore[no-any-return]


async def test_a_deadline_of_the_handlers_own() -> None:
    async def handler(_: object, __: object) -> AsyncIterator[int]:
        try:
            async with asyncio.timeout(0.05):
                while True:
                    yield 1
        except TimeoutError:
            raise errors.DeadlineExceeded("too late") from None

    assert (await ended(handler)).code is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("is_told", [True, False])
async def test_cancelled_by_somebody(is_told: bool) -> None:
    """The handler may turn it into an error; otherwise the peer is gone, and there is no word."""
    is_closed = False

    async def handler(_: object, __: object) -> AsyncIterator[int]:
        nonlocal is_closed
        try:
            yield 1
        except asyncio.CancelledError:
            if is_told:
                raise errors.FailedPrecondition("aborted", reason="ABORTED") from None
            raise
        finally:
            is_closed = True

    context = await ended(handler, cancel=True)
    assert is_closed
    assert context.code is (grpc.StatusCode.FAILED_PRECONDITION if is_told else None)


async def test_a_handler_that_ends_quietly() -> None:
    async def handler(_: object, __: object) -> AsyncIterator[int]:
        try:
            yield 1
        except asyncio.CancelledError:
            return

    assert (await ended(handler, cancel=True)).code is None
