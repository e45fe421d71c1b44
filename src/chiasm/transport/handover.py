"""One call at a time for each request id."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

TIMEOUT_S = 1.0
"""How long a call waits for an earlier one with its id to end."""

Calls = Mapping[str, asyncio.Task[object]]
"""The calls in flight, by their request's id."""


def current_task() -> asyncio.Task[object]:
    """The task of the call that is being answered."""
    task = asyncio.current_task()
    assert task is not None
    return task


async def vacated(calls: Calls, request_id: str) -> None:
    """Waits a moment for another call with the id to end, if there is one.

    A peer that has lost its connection may be back before this side has noticed the loss.
    """
    end = time.monotonic() + TIMEOUT_S
    while other := calls.get(request_id):
        left_s = end - time.monotonic()
        if left_s <= 0:
            return
        await asyncio.wait({other}, timeout=left_s)
