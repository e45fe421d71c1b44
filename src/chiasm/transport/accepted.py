"""How a member says that it has taken a request in hand, and its caller hears of it."""

from __future__ import annotations

from typing import Any

import grpc

_KEY = "chiasm-accepted"


async def accept(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Says so at once, and again at the end: gRPC's client forgets the beginning of a call whose
    end it has read first. Of a member that dies there is only the beginning."""
    context.set_trailing_metadata(((_KEY, ""),))
    await context.send_initial_metadata(((_KEY, ""),))


async def was_accepted(call: grpc.aio.Call) -> bool:
    """Whether the member had it in hand; for a call that has ended."""
    ends = (await call.initial_metadata(), await call.trailing_metadata())
    return any(_KEY in dict(metadata or ()) for metadata in ends)
