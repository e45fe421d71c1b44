"""Channels to the members of the topology: one per address, kept while the address is listed."""

from __future__ import annotations

import asyncio

import grpc

from chiasm.membership import Topology
from chiasm.transport.channel import open_channel


class Channels:
    """Opens channels on demand. `follow` is called with every new topology."""

    def __init__(self, *, max_message_bytes: int, grace_s: float) -> None:
        self._max_message_bytes, self._grace_s = max_message_bytes, grace_s
        self._open: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to host:port."""
        if address not in self._open:
            self._open[address] = open_channel(address, max_message_bytes=self._max_message_bytes)
        return self._open[address]

    def follow(self, topology: Topology) -> None:
        """Closes the channels of addresses that are gone; calls on them may still end in time."""
        listed = {member.address for member in topology.members}
        for address in self._open.keys() - listed:
            task = asyncio.ensure_future(self._open.pop(address).close(self._grace_s))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Closes all channels at once."""
        for channel in self._open.values():
            await channel.close(None)
        self._open.clear()
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
