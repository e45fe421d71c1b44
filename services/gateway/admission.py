"""Calls beyond what the gateway works on are refused before anything of them is read.

The servicer keeps to `max_in_flight`, but it sees a call only once all of its message is there. So
that many messages, with all their media, cannot fill the memory first, a little above that bound
the door is shut.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from chiasm import errors
from chiasm.transport.interceptors import Interceptor, refusal

SPARE = 16
"""Calls above `max_in_flight` whose messages are read: those that ask for the model, and those that
the servicer refuses and counts."""


class AdmissionInterceptor(Interceptor):
    """Bounds the calls of one service, `service` by its full name, from their headers to their end.

    Health and reflection are not counted.
    """

    def __init__(self, service: str, *, max_in_flight: int, retry_after_s: float) -> None:
        self._prefix, self._limit = f"/{service}/", max_in_flight + SPARE
        self._retry_after_s = retry_after_s
        self._num_calls = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(self._prefix):
            return handler
        if self._num_calls >= self._limit:
            error = errors.ResourceExhausted(
                f"{self._num_calls} requests are in flight",
                reason="GATEWAY_FULL",
                retry_after_s=self._retry_after_s,
            )
            return refusal(method, error)
        # The call's own task: it ends with the call, also with one whose message never comes.
        task = asyncio.current_task()
        assert task is not None
        self._num_calls += 1
        task.add_done_callback(self._ended)
        return handler

    def _ended(self, _: object) -> None:
        self._num_calls -= 1
