"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

_HELD_PER_STREAM = 2
"""Items that wait for a slow reader, per stream; then the streams wait."""


async def merged(
    streams: Sequence[AsyncGenerator[T, None]], is_under_way: Callable[[T], bool]
) -> AsyncGenerator[T, None]:
    """The items of all streams as they come; those of one stream in their order.

    A stream is alone until an item is under way, one stream after another: what it leaves in a
    cache makes the others cheap. The first error of a stream ends all; so does closing. The streams
    are closed in any case.
    """
    try:
        for i, stream in enumerate(streams, start=1):
            is_alone = True
            async for item in stream:
                yield item
                if i < len(streams) and is_under_way(item):
                    is_alone = False
                    break
            if not is_alone:
                break
        else:
            return
        together = _together(streams)
        try:
            async for item in together:
                yield item
        finally:
            await together.aclose()
    finally:
        for stream in streams:
            await stream.aclose()


async def _together(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    items = asyncio.Queue[tuple[T] | BaseException | None](_HELD_PER_STREAM * len(streams))

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        try:
            async for item in stream:
                await items.put((item,))
            await items.put(None)
        except Exception as error:  # whatever it is, the reader raises it
            await items.put(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    num_running = len(tasks)
    try:
        while num_running:
            match await items.get():
                case None:
                    num_running -= 1
                case BaseException() as error:
                    raise error
                case (item,):
                    yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
