"""Waits for what another task or thread does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

WAIT_S = 20.0


async def until(condition: Callable[[], object]) -> None:
    """Returns once it holds. Raises TimeoutError after WAIT_S."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # it may be a thread's
            await asyncio.sleep(0.001)
