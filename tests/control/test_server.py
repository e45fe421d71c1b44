"""How a server ends: callers move on, calls are finished, and nobody is waited for in vain."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chiasm.transport import server
from chiasm.transport.messages import CONTROL_BYTES
from chiasm.transport.server import Server

WAIT_S = 20.0


class Echo:
    """A server whose only method sends its name until it is told to end."""

    def __init__(self, name: str, *, moves_callers: bool = True) -> None:
        self.name, self.may_end = name.encode(), asyncio.Event()
        self.moves_callers = moves_callers
        self.server = Server(services=["test.Echo"], max_message_bytes=CONTROL_BYTES)
        handler = grpc.unary_stream_rpc_method_handler(self.names)
        generic = grpc.method_handlers_generic_handler("test.Echo", {"Names": handler})
        self.server.grpc.add_generic_rpc_handlers((generic,))

    async def names(self, _request: bytes, _context: object) -> AsyncIterator[bytes]:
        yield self.name
        await self.may_end.wait()
        yield self.name

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        port = await self.server.start("127.0.0.1:0")
        await self.server.set_serving(True)
        running = asyncio.create_task(
            self.server.run_until_stopped(
                grace_s=3 * WAIT_S, on_drain=self.may_end.wait, moves_callers=self.moves_callers
            )
        )
        yield port
        self.may_end.set()
        self.server.stopping.set()
        async with asyncio.timeout(WAIT_S):
            await running


async def name_of(channel: grpc.aio.Channel) -> bytes:
    """Who answers a new call; nobody does at the very moment of a shutdown: the call is cancelled,
    or lost inside grpc until its deadline."""
    call = channel.unary_stream("/test.Echo/Names")(b"", timeout=2.0, wait_for_ready=True)
    with contextlib.suppress(grpc.aio.AioRpcError):
        name: bytes = await call.read()
        call.cancel()
        return name
    lost = (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert await call.code() in lost
    return b""


async def test_connections_move_while_calls_are_finished() -> None:
    one, two = Echo("one"), Echo("two")
    async with one.running() as a, two.running() as b:
        channel = grpc.aio.insecure_channel(f"ipv4:127.0.0.1:{a},127.0.0.1:{b}")
        call = channel.unary_stream("/test.Echo/Names")(b"", timeout=WAIT_S)
        # The second may be it: whoever accepts the connection first.
        first, second = (one, two) if await call.read() == one.name else (two, one)
        first.server.stopping.set()
        async with asyncio.timeout(WAIT_S):
            while await name_of(channel) != second.name:
                pass
        first.may_end.set()
        assert await call.read() == first.name
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        await channel.close()


@pytest.mark.parametrize("moves_callers", [False, True])
async def test_who_watches_health_is_not_waited_for(moves_callers: bool) -> None:
    echo = Echo("only", moves_callers=moves_callers)
    async with echo.running() as port:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        states = health_pb2.HealthCheckResponse
        assert (await watch.read()).status == states.SERVING
    assert (await watch.read()).status == states.NOT_SERVING
    assert await watch.read() is grpc.aio.EOF
    await channel.close()


@pytest.mark.parametrize("moves_callers", [False, True])
async def test_calls_do_not_outlast_the_drain(moves_callers: bool, monkeypatch: Any) -> None:
    """As a call does that was lost inside grpc: nobody works for it, and its deadline is far."""
    monkeypatch.setattr(server, "LAST_CALLS_S", 0.2)
    echo = Echo("only", moves_callers=moves_callers)
    port = await echo.server.start("127.0.0.1:0")
    await echo.server.set_serving(True)
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    call = channel.unary_stream("/test.Echo/Names")(b"", timeout=20 * WAIT_S)
    assert await call.read() == b"only"
    echo.server.stopping.set()
    async with asyncio.timeout(WAIT_S):
        await echo.server.run_until_stopped(grace_s=20 * WAIT_S, moves_callers=moves_callers)
        assert await call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    await channel.close()
