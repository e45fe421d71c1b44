"""What the clients make of a peer that fails, before any gateway has a say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
from loopback import listening

from chiasm import errors
from chiasm.client import AsyncClient, Client, Finished, OneOf, Sampling, codec
from chiasm.v1 import inference_pb2, inference_pb2_grpc

WAIT_S = 10.0


class Peer(inference_pb2_grpc.InferenceServicer):
    """Ends calls with a bare status, as proxies do; starts answers that never go on."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    async def GetModel(
        self,
        request: inference_pb2.GetModelRequest,
        context: grpc.aio.ServicerContext[
            inference_pb2.GetModelRequest, inference_pb2.GetModelResponse
        ],
    ) -> inference_pb2.GetModelResponse:
        await context.abort(self._code, "says the peer")
        raise AssertionError

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: object
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield inference_pb2.GenerateResponse(started=inference_pb2.Started(model="m"))
        await asyncio.sleep(60)


@contextlib.asynccontextmanager
async def peer(code: grpc.StatusCode = grpc.StatusCode.UNKNOWN) -> AsyncIterator[str]:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(Peer(code), server)
    async with listening(server) as address:
        yield address


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, errors.Internal),
        (grpc.StatusCode.UNKNOWN, errors.Internal),
        (grpc.StatusCode.CANCELLED, errors.Unavailable),
        (grpc.StatusCode.NOT_FOUND, errors.NotFound),
    ],
)
async def test_a_bare_status_keeps_its_name(
    code: grpc.StatusCode, kind: type[errors.ChiasmError]
) -> None:
    async with peer(code) as address, AsyncClient(address) as client:
        with pytest.raises(kind, match="says the peer") as caught:
            await client.get_model()
        assert caught.value.reason == code.name


async def test_who_cannot_be_reached_is_named() -> None:
    """grpc itself names the address it tried, which behind a name or a proxy is another one."""
    async with AsyncClient("localhost:1") as client:
        with pytest.raises(errors.Unavailable, match=r"^localhost:1: "):
            await client.get_model()
        with pytest.raises(errors.Unavailable, match=r"^localhost:1: "):
            await client.complete("Hello")
    with (
        Client("localhost:1") as blocking,
        pytest.raises(errors.Unavailable, match=r"^localhost:1"),
    ):
        blocking.count_tokens("Hello")


async def test_waiting_tells_what_the_tries_ended_with() -> None:
    """The peer has no health service, so that every try ends as the method is unknown."""
    async with peer() as address, AsyncClient(address) as client:
        with pytest.raises(errors.Unavailable, match=r"was not ready within 2 s: .*not found"):
            await client.wait_ready(2)
    with Client("127.0.0.1:1") as blocking, pytest.raises(errors.Unavailable, match="connect"):
        blocking.wait_ready(2)


async def test_closing_ends_a_stream_of_another_task_with_an_error() -> None:
    async with peer() as address:
        client, begun = AsyncClient(address), asyncio.Event()

        async def stream() -> None:
            async for _ in client.generate("x"):
                begun.set()

        task = asyncio.create_task(stream())
        await asyncio.wait_for(begun.wait(), WAIT_S)
        await client.close()
        with pytest.raises(errors.Unavailable, match="the client was closed"):
            await asyncio.wait_for(task, WAIT_S)


async def test_a_task_that_is_cancelled_stays_so() -> None:
    async with peer() as address, AsyncClient(address) as client:
        begun = asyncio.Event()

        async def stream() -> None:
            async for _ in client.generate("x"):
                begun.set()

        task = asyncio.create_task(stream())
        await asyncio.wait_for(begun.wait(), WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_a_finish_reason_of_a_newer_server_is_an_end() -> None:
    unknown = 1000  # enums are open: proto3 keeps numbers it has no name for
    finished = inference_pb2.GenerateResponse()
    finished.finished.MergeFromString(bytes([8, 0x80 | unknown & 0x7F, unknown >> 7]))
    event = codec.event(finished)
    assert isinstance(event, Finished)
    assert event.reason == "other"


def test_a_bare_string_is_one_string() -> None:
    options = codec.Options(sampling=Sampling(stop="END", response_format=OneOf("yes")))
    sent = codec.generate_request("x", options, request_id="").sampling
    assert list(sent.stop) == ["END"]
    assert list(sent.response_format.choice.texts) == ["yes"]


async def test_a_closed_client_says_so() -> None:
    async with peer() as address:
        client = AsyncClient(address)
        await client.close()
        for _ in range(2):
            for call in (client.get_model, client.wait_ready, lambda: client.complete("hello")):
                async with asyncio.timeout(WAIT_S):
                    with pytest.raises(errors.FailedPrecondition, match="closed"):
                        await call()


def test_so_does_a_closed_blocking_client() -> None:
    client = Client("127.0.0.1:1")
    started = client.generate("hello")
    client.close()
    calls = (
        client.get_model,
        client.wait_ready,
        lambda: client.complete("hello"),
        lambda: client.count_tokens("hello"),
        lambda: next(client.generate("hello")),
        lambda: next(started),
    )
    for call in calls:
        with pytest.raises(errors.FailedPrecondition, match="closed"):
            call()
