"""Calls whose status gRPC's client may lose."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc

from chiasm.transport import status

ATTEMPTS = 10

T = TypeVar("T")


async def told(call: Callable[[], Awaitable[T]]) -> T:
    """What a call gives or raises, asked again while the error is none of the server's.

    Where a refusal is faster than what the client still writes, the failed write takes the place of
    its status.
    """
    for attempt in range(ATTEMPTS):
        try:
            return await call()
        except grpc.RpcError as error:
            if status.has_details(error) or attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt returns or raises")
