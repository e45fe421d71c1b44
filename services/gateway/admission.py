"""Calls beyond what the gateway works on are refused before anything of them is read.

The servicer keeps to `max_in_flight`, but it sees a call only once all of its message is there. So
that many messages, with all their media, cannot fill the memory first, a little above that bound
the door is shut.
"""

from __future__ import annotations

import grpc

from chiasm import errors
from chiasm.transport import handover

SPARE = 16
"""Calls above `max_in_flight` whose messages are read: those that ask for the model, and those that
the servicer refuses and counts."""


def full(problem: str, retry_after_s: float) -> errors.ResourceExhausted:
    """What a gateway without room refuses with, wherever it finds out."""
    return errors.ResourceExhausted(problem, reason="GATEWAY_FULL", retry_after_s=retry_after_s)


class AdmissionGuard:
    """Bounds the calls of one service, `service` by its full name, from their headers to their end.

    Health and reflection are not counted.
    """

    def __init__(self, service: str, *, max_in_flight: int, retry_after_s: float) -> None:
        self._prefix, self._limit = f"/{service}/", max_in_flight + SPARE
        self._retry_after_s = retry_after_s
        self._num_calls = 0

    def check(self, details: grpc.HandlerCallDetails) -> None:
        if not details.method.startswith(self._prefix):
            return
        if self._num_calls >= self._limit:
            raise full(f"{self._num_calls} requests are in flight", self._retry_after_s)
        # The call's own task: it ends with the call, also with one that is given up before its
        # message has come.
        handover.current_task().add_done_callback(self._ended)
        self._num_calls += 1

    def _ended(self, _: object) -> None:
        self._num_calls -= 1
