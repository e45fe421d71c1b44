"""Requests made ready ahead of their time, so that making them does not delay the sending."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from chiasm.bench.backend import Backend, Call
from chiasm.bench.workload import Conversation

AHEAD = 64
"""Requests that are ready at most; with their images they are what the generator holds."""

Ready = tuple[Conversation, Call]


class Supply:
    """Conversations with their first request prepared."""

    def __init__(self, backend: Backend, conversations: Iterator[Conversation]) -> None:
        self._backend, self._conversations = backend, conversations
        self._queue: asyncio.Queue[Ready | None] = asyncio.Queue(AHEAD)
        self._primed = asyncio.Event()

    async def fill(self) -> None:
        """Prepares until the workload ends; run it as a task beside the readers."""
        loop = asyncio.get_running_loop()
        for conversation in self._conversations:
            call = await loop.run_in_executor(
                None, self._backend.prepare, (), conversation.turns[0]
            )
            if self._queue.full():
                self._primed.set()
            await self._queue.put((conversation, call))
        self._primed.set()
        await self._queue.put(None)

    async def primed(self) -> None:
        """Returns when as much is ready as may be."""
        await self._primed.wait()

    async def next(self) -> Ready | None:
        """The next one; None, from then on, at the end of the workload."""
        ready = await self._queue.get()
        if ready is None:
            self._queue.put_nowait(None)
        return ready
