"""Calls to expert servers: what they shall hold, and when they shall stop. Each one is bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import grpc

from chiasm import errors
from chiasm.transport import status
from chiasm.transport.channel import open_channel
from chiasm.transport.messages import CONTROL_BYTES
from chiasm.v1 import experts_pb2, experts_pb2_grpc

CALL_TIMEOUT_S = 2.0


class ExpertServers:
    """One connection to each, by address."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._in_flight: Counter[str] = Counter()

    async def assign(
        self, address: str, shards: Collection[int], epoch: int
    ) -> experts_pb2.PoolDescription:
        """Raises Unavailable, and FailedPrecondition for an epoch that the server has passed, or
        that stands for other shards there."""
        request = experts_pb2.AssignRequest(shards=sorted(shards), epoch=epoch)
        return await self._call(address, self._stub(address).Assign, request)

    async def drain(self, address: str, lease_s: float) -> experts_pb2.PoolDescription:
        """Makes a server refuse new dispatches, for `lease_s` unless asked again. Raises
        Unavailable."""
        request = experts_pb2.DrainRequest(lease_ms=int(lease_s * 1000))
        return await self._call(address, self._stub(address).Drain, request)

    async def describe(self, address: str) -> experts_pb2.PoolDescription:
        """How a server stands. Raises Unavailable."""
        method = self._stub(address).Describe
        return await self._call(address, method, experts_pb2.DescribeRequest())

    async def keep(self, addresses: Collection[str]) -> None:
        """Closes the connections to all others, but those with a call in flight."""
        for address in self._channels.keys() - set(addresses):
            if not self._in_flight[address]:
                await self._channels.pop(address).close(None)

    async def close(self) -> None:
        """Closes all connections."""
        for address in tuple(self._channels):
            await self._channels.pop(address).close(None)

    def _stub(self, address: str) -> experts_pb2_grpc.ExpertPoolStub:
        if address not in self._channels:
            self._channels[address] = open_channel(address, max_message_bytes=CONTROL_BYTES)
        return experts_pb2_grpc.ExpertPoolStub(self._channels[address])

    async def _call(
        self,
        address: str,
        method: Callable[..., Awaitable[experts_pb2.PoolDescription]],
        request: Any,
    ) -> experts_pb2.PoolDescription:
        self._in_flight[address] += 1
        try:
            return status.parsed(await method(request, timeout=CALL_TIMEOUT_S), address)
        except errors.DataLoss as error:
            raise errors.Unavailable(error.message) from None
        except grpc.RpcError as error:
            found = status.from_rpc_error(error)
            if isinstance(found, errors.DeadlineExceeded):
                raise errors.Unavailable("the expert server does not answer") from None
            raise found from None
        finally:
            self._in_flight[address] -= 1
            if not self._in_flight[address]:
                del self._in_flight[address]
