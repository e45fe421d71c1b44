"""A gateway that is full refuses calls before it has read their messages."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from chiasm import errors
from chiasm.services.gateway.admission import SPARE, AdmissionGuard
from chiasm.transport import status
from chiasm.transport.interceptors import CallInterceptor, Guard, Guards
from chiasm.v1 import inference_pb2, inference_pb2_grpc

SERVICE = "chiasm.v1.Inference"
WAIT_S = 20.0


class Servicer(inference_pb2_grpc.InferenceServicer):
    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: Any
    ) -> inference_pb2.GetModelResponse:
        return inference_pb2.GetModelResponse(name="m")


@contextlib.asynccontextmanager
async def serving(
    *guards: Guard, message_timeout_s: float = WAIT_S
) -> AsyncIterator[grpc.aio.Channel]:
    calls = CallInterceptor(message_timeout_s=message_timeout_s)
    server = grpc.aio.server(interceptors=[calls, Guards(*guards)])
    inference_pb2_grpc.add_InferenceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    await server.stop(None)


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    async with serving(AdmissionGuard(SERVICE, max_in_flight=2, retry_after_s=3.0)) as opened:
        yield opened


async def refused(channel: grpc.aio.Channel) -> errors.ChiasmError | None:
    """How a small call ends."""
    stub: Any = inference_pb2_grpc.InferenceStub(channel)
    try:
        await stub.GetModel(inference_pb2.GetModelRequest(), timeout=WAIT_S)
    except grpc.aio.AioRpcError as error:
        return status.from_rpc_error(error)
    return None


async def until(channel: grpc.aio.Channel, *, full: bool) -> errors.ChiasmError | None:
    end = time.monotonic() + WAIT_S
    while bool(error := await refused(channel)) is not full:
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    return error


async def test_calls_whose_messages_have_not_come_are_counted(channel: grpc.aio.Channel) -> None:
    """And no more when they are given up."""
    open_call = channel.stream_stream(f"/{SERVICE}/Generate")
    calls = [open_call() for _ in range(2 + SPARE)]
    error = await until(channel, full=True)
    assert isinstance(error, errors.ResourceExhausted)
    assert (error.reason, error.retry_after_s) == ("GATEWAY_FULL", 3.0)
    for call in calls:
        call.cancel()
    await until(channel, full=False)


async def test_a_message_that_never_comes_gives_its_place_back() -> None:
    guard = AdmissionGuard(SERVICE, max_in_flight=2, retry_after_s=3.0)
    async with serving(guard, message_timeout_s=0.2) as channel:
        for method, kind in (("Generate", "stream_stream"), ("GetModel", "stream_unary")):
            calls = [getattr(channel, kind)(f"/{SERVICE}/{method}")() for _ in range(2 + SPARE)]
            async with asyncio.timeout(WAIT_S):
                codes = {await call.code() for call in calls}
            late, full = grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED
            assert late in codes
            assert codes <= {late, full}
        await until(channel, full=False)


async def test_a_call_without_a_message(channel: grpc.aio.Channel) -> None:
    call = channel.stream_unary(f"/{SERVICE}/GetModel")()
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_guard_does_not_hear_of_what_one_before_it_refuses() -> None:
    """So that who has no key takes no place."""
    heard: list[str] = []

    class Refusing:
        def check(self, details: grpc.HandlerCallDetails) -> None:
            raise errors.Unauthenticated("no")

    class Hearing:
        def __init__(self, name: str) -> None:
            self._name = name

        def check(self, details: grpc.HandlerCallDetails) -> None:
            heard.append(self._name)

    async with serving(Hearing("first"), Refusing(), Hearing("last")) as channel:
        assert isinstance(await refused(channel), errors.Unauthenticated)
    assert heard == ["first"]
