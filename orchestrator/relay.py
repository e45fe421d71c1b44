"""Followers send every call on to the leader, so that any orchestrator may be asked.

The alternative, followers that are not ready, would keep rolling updates from ever finishing: the
new process is not ready before the old one has gone. See ADR 0014.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc

from chiasm import errors
from chiasm.transport import status
from chiasm.transport.channel import open_channel
from chiasm.transport.interceptors import Interceptor
from chiasm.transport.messages import CONTROL_BYTES

_RELAYED_KEY = "chiasm-relayed"
"""Metadata of a call that comes from a follower."""

OWN = ("/grpc.health.v1.Health/", "/grpc.reflection.")
"""What each process answers for itself."""

RETRY_AFTER_S = 1.0

_NOT_PASSED_ON = ("user-agent",)


def is_relayed(metadata: Iterable[tuple[str, str | bytes]]) -> bool:
    """Whether a call with this metadata comes from a follower."""
    return any(key == _RELAYED_KEY for key, _ in metadata)


class Relay(Interceptor):
    """Passes the messages of a call on as they are, both ways, and its status.

    leads: whether this process is the leader, and answers itself.
    leader: host:port of the leader; empty while there is none.
    """

    def __init__(self, *, leads: Callable[[], bool], leader: Callable[[], str]) -> None:
        self._leads, self._leader = leads, leader
        self._address = ""
        self._channel: grpc.aio.Channel | None = None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        details = handler_call_details
        handler = await continuation(details)
        if handler is None or self._leads() or details.method.startswith(OWN):
            return handler
        metadata = [(k, v) for k, v in details.invocation_metadata if k not in _NOT_PASSED_ON]
        was_relayed = is_relayed(metadata)
        metadata.append((_RELAYED_KEY, "1"))

        # On the wire a call of one message is a stream of one message.
        async def forward(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            leader = self._leader()
            if was_relayed or not leader:
                raise _no_leader("there is no leader")
            call = (await self._to(leader)).stream_stream(details.method, None, None)(
                requests, timeout=context.time_remaining(), metadata=metadata
            )
            try:
                async for answer in call:
                    yield answer
            except grpc.aio.AioRpcError as error:
                if status.has_details(error):
                    raise status.from_rpc_error(error) from None
                # Not the leader's word, but grpc's: that it has gone, in one of several ways.
                raise _no_leader("the leader does not answer") from None
            finally:
                call.cancel()

        return grpc.stream_stream_rpc_method_handler(forward)

    async def close(self) -> None:
        """Ends what is being relayed."""
        if self._channel is not None:
            await self._channel.close(None)

    async def _to(self, leader: str) -> grpc.aio.Channel:
        """One connection for all calls; a change of the leader ends those to the old one."""
        if self._channel is None or leader != self._address:
            old, self._address = self._channel, leader
            self._channel = open_channel(leader, max_message_bytes=CONTROL_BYTES)
            if old is not None:
                await old.close(None)
        return self._channel


def _no_leader(message: str) -> errors.Unavailable:
    return errors.Unavailable(message, reason="NO_LEADER", retry_after_s=RETRY_AFTER_S)
