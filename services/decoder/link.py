"""One Dispatch stream to one expert server: many calls in flight, matched by id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from chiasm import errors
from chiasm.transport.channel import open_channel
from chiasm.v1 import experts_pb2, experts_pb2_grpc


class NoAnswer(errors.DeadlineExceeded):
    """The server has said nothing, not even that it is too busy."""


class ServerLink:
    """Opens its stream at once and lives as long as the stream; a broken link is thrown away."""

    def __init__(self, address: str, *, max_message_bytes: int) -> None:
        self.address = address
        self.is_broken = False
        self._pending: dict[int, asyncio.Future[experts_pb2.DispatchResponse]] = {}
        self._next_id = 0
        self._requests: asyncio.Queue[experts_pb2.DispatchRequest | None] = asyncio.Queue()
        self._channel = open_channel(address, max_message_bytes=max_message_bytes)
        self._call = experts_pb2_grpc.ExpertPoolStub(self._channel).Dispatch(self._outgoing())
        self._reader = asyncio.create_task(self._read(), name=f"link {address}")

    @property
    def num_pending(self) -> int:
        """Calls in flight."""
        return len(self._pending)

    async def call(
        self, request: experts_pb2.DispatchRequest, *, timeout_s: float
    ) -> experts_pb2.DispatchResponse:
        """Sends a dispatch and waits for its answer; sets the request's id and timeout.

        Raises Unavailable when the stream breaks, NoAnswer when time is up, and what the server
        answered where it answered an error.
        """
        if self.is_broken:
            raise errors.Unavailable(f"{self.address} is away")
        request.dispatch_id = self._next_id = self._next_id + 1
        request.timeout_ns = int(timeout_s * 1e9)
        answer = asyncio.get_running_loop().create_future()
        self._pending[request.dispatch_id] = answer
        self._requests.put_nowait(request)
        try:
            async with asyncio.timeout(timeout_s):
                response: experts_pb2.DispatchResponse = await answer
        except TimeoutError:
            raise NoAnswer(f"{self.address} did not answer within {timeout_s:.1f} s") from None
        finally:
            self._pending.pop(request.dispatch_id, None)
        if response.WhichOneof("result") == "error":
            raise errors.from_code(response.error.code, f"{self.address}: {response.error.message}")
        return response

    async def close(self) -> None:
        """Ends the stream; calls in flight fail with Unavailable."""
        self._fail(errors.Unavailable(f"the link to {self.address} is closed"))
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close(None)

    async def _outgoing(self) -> AsyncIterator[experts_pb2.DispatchRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def _read(self) -> None:
        try:
            async for response in self._call:
                answer = self._pending.get(response.dispatch_id)
                if answer is not None and not answer.done():
                    answer.set_result(response)
            self._fail(errors.Unavailable(f"{self.address} ended the stream"))
        except grpc.RpcError as error:
            # Whatever ended the stream, the dispatches on it can be repeated.
            self._fail(errors.Unavailable(f"{self.address}: {error.details()}"))

    def _fail(self, error: errors.ChiasmError) -> None:
        self.is_broken = True
        self._requests.put_nowait(None)
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(error)
