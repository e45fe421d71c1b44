"""A gateway over loopback grpc, with scripted encoders and decoders behind it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from PIL import Image

from chiasm import errors
from chiasm.membership import MemberInfo, MemberState, Role, Topology
from chiasm.model.config import ModelConfig
from chiasm.model.tokenizer import Tokenizer
from chiasm.services.gateway import engine, utf8
from chiasm.services.gateway.__main__ import SERVICE
from chiasm.services.gateway.channels import Channels
from chiasm.services.gateway.config import GatewaySettings
from chiasm.services.gateway.servicer import InferenceServicer
from chiasm.transport import channel
from chiasm.transport.accepted import accept
from chiasm.transport.interceptors import CallInterceptor
from chiasm.transport.membership import TopologyWatcher
from chiasm.v1 import (
    common_pb2,
    decoder_pb2,
    decoder_pb2_grpc,
    encoder_pb2,
    encoder_pb2_grpc,
    inference_pb2,
)

GRIDS = {
    common_pb2.MEDIA_KIND_IMAGE: common_pb2.GridThw(t=1, h=4, w=6),
    common_pb2.MEDIA_KIND_VIDEO: common_pb2.GridThw(t=4, h=4, w=4),
}
TOKENS = {common_pb2.MEDIA_KIND_IMAGE: 6, common_pb2.MEDIA_KIND_VIDEO: 8}
"""Embeddings of every image and video the scripted encoders see."""

_NAMES = {common_pb2.MEDIA_KIND_IMAGE: b"image", common_pb2.MEDIA_KIND_VIDEO: b"video"}

Script = Callable[[decoder_pb2.DecodeRequest], AsyncIterator[decoder_pb2.DecodeEvent]]


def png(width: int = 40, height: int = 30, color: str = "red") -> bytes:
    """A small image."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def tokens_event(*token_ids: int) -> decoder_pb2.DecodeEvent:
    return decoder_pb2.DecodeEvent(tokens=decoder_pb2.DecodedTokens(token_ids=token_ids))


def finished_event(reason: int = inference_pb2.FINISH_REASON_STOP) -> decoder_pb2.DecodeEvent:
    timings = inference_pb2.Timings(prefill_ns=7, decode_ns=9)
    return decoder_pb2.DecodeEvent(
        finished=decoder_pb2.DecodeFinished(reason=reason, timings=timings)
    )


class FakeDecoder(decoder_pb2_grpc.DecoderServicer):
    """Answers with `token_ids`, or as the next of `scripts` says; `accepts`: tells so first."""

    def __init__(self) -> None:
        self.token_ids: list[int] = [10, 11, 12]
        self.accepts = False
        self.scripts: deque[Script] = deque()
        self.requests: list[decoder_pb2.DecodeRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.time_left_s: list[float | None] = []
        self.cancelled = asyncio.Event()

    async def Decode(
        self, request: decoder_pb2.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decoder_pb2.DecodeEvent]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.time_left_s.append(context.time_remaining())
        if self.accepts:
            await accept(context)
        script = self.scripts.popleft() if self.scripts else self._answer
        try:
            async for event in script(request):
                yield event
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _answer(
        self, request: decoder_pb2.DecodeRequest
    ) -> AsyncIterator[decoder_pb2.DecodeEvent]:
        token_ids = self.token_ids[: request.sampling.max_tokens or None]
        for token_id in token_ids:
            yield tokens_event(token_id)
        is_whole = len(token_ids) == len(self.token_ids)
        reasons = (inference_pb2.FINISH_REASON_LENGTH, inference_pb2.FINISH_REASON_STOP)
        yield finished_event(reasons[is_whole])


class FakeEncoder(encoder_pb2_grpc.VisionEncoderServicer):
    """Receives uploads, checks them, and answers with GRIDS unless `failures` has something."""

    def __init__(self) -> None:
        self.failures: deque[errors.ChiasmError] = deque()
        self.headers: list[encoder_pb2.EncodeHeader] = []
        self.metadata: list[dict[str, Any]] = []
        self.cached: set[str] = set()
        self.bytes_received = 0
        self.is_stuck = self.breaks_off = False
        self.cancelled = asyncio.Event()

    async def Encode(
        self,
        requests: AsyncIterator[encoder_pb2.EncodeRequest],
        context: grpc.aio.ServicerContext,
    ) -> encoder_pb2.EncodeResult:
        header = (await anext(aiter(requests))).header
        self.headers.append(header)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        if self.failures:
            raise self.failures.popleft()
        if self.is_stuck:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if header.digest not in self.cached:
            data = b"".join([part.chunk async for part in requests])
            self.bytes_received += len(data)
            hashed = hashlib.sha256(_NAMES[header.kind] + b"\0" + data)
            assert hashed.hexdigest() == header.digest
            assert len(data) == header.size_bytes
        if self.breaks_off:
            await accept(context)
            raise errors.Unavailable("killed by this file")
        return encoder_pb2.EncodeResult(
            digest=header.digest, grid=GRIDS[header.kind], num_tokens=TOKENS[header.kind]
        )


class Directory(TopologyWatcher):
    """A topology that the test writes."""

    def __init__(self) -> None:
        super().__init__("")
        self._members: dict[str, MemberInfo] = {}

    def add(self, role: Role, address: str) -> None:
        self._members[address] = MemberInfo(
            member_id=address, role=role, address=address, state=MemberState.READY
        )
        self._publish_members()

    def remove(self, address: str) -> None:
        del self._members[address]
        self._publish_members()

    def _publish_members(self) -> None:
        members = tuple(self._members[key] for key in sorted(self._members))
        self._publish(Topology(settling=False, members=members))


class Stack:
    """One gateway, and the members it knows."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self.settings = GatewaySettings(
            **{"model": model, "model_name": "tiny", "park_timeout_s": 5.0, **settings}
        )
        self.config = ModelConfig.load(model)
        self.tokenizer = Tokenizer.load(model)
        self.directory = Directory()
        self.servers: dict[str, grpc.aio.Server] = {}
        self.address = ""

    async def start(self) -> None:
        self.channels = Channels(max_message_bytes=engine.MAX_PEER_MESSAGE_BYTES, grace_s=1.0)
        self.directory.subscribe(self.channels.follow)
        servicer = InferenceServicer(self.settings)
        self.engine = servicer.engine = engine.build(
            self.settings, self.config, self.tokenizer, self.directory, self.channels
        )
        health = health_aio.HealthServicer()
        await health.set(SERVICE.full_name, health_pb2.HealthCheckResponse.SERVING)

        def register(server: grpc.aio.Server) -> None:
            server.add_generic_rpc_handlers((utf8.handlers(SERVICE, servicer),))
            health_pb2_grpc.add_HealthServicer_to_server(health, server)

        self.address = await self._serve(register)

    async def add_decoder(self) -> FakeDecoder:
        decoder = FakeDecoder()
        decoder.address = await self._serve(
            lambda server: decoder_pb2_grpc.add_DecoderServicer_to_server(decoder, server)
        )
        self.directory.add(Role.DECODER, decoder.address)
        return decoder

    async def add_encoder(self) -> FakeEncoder:
        encoder = FakeEncoder()
        encoder.address = await self._serve(
            lambda server: encoder_pb2_grpc.add_VisionEncoderServicer_to_server(encoder, server)
        )
        self.directory.add(Role.VISION_ENCODER, encoder.address)
        return encoder

    async def kill(self, address: str) -> None:
        """Ends a member at once; the topology still lists it."""
        await self.servers.pop(address).stop(None)

    async def stop(self) -> None:
        await self.channels.close()
        for server in self.servers.values():
            await server.stop(None)

    async def _serve(self, register: Callable[[grpc.aio.Server], Any]) -> str:
        server = grpc.aio.server(
            interceptors=[CallInterceptor()],
            options=channel.options(self.settings.max_request_bytes),
        )
        register(server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self.servers[address] = server
        return address


@contextlib.asynccontextmanager
async def running(model: Path, **settings: Any) -> AsyncIterator[Stack]:
    """A started stack without members."""
    stack = Stack(model, **settings)
    await stack.start()
    try:
        yield stack
    finally:
        await stack.stop()


@contextlib.contextmanager
def in_thread(model: Path, **settings: Any) -> Iterator[tuple[Stack, FakeDecoder, FakeEncoder]]:
    """A stack with a decoder and an encoder in a loop of its own, for blocking callers."""
    ready, done = threading.Event(), asyncio.Event()
    held: list[Any] = []

    async def live() -> None:
        async with running(model, **settings) as stack:
            held.extend(
                (
                    asyncio.get_running_loop(),
                    stack,
                    await stack.add_decoder(),
                    await stack.add_encoder(),
                )
            )
            ready.set()
            await done.wait()

    thread = threading.Thread(target=lambda: asyncio.run(live()))
    thread.start()
    assert ready.wait(30)
    try:
        yield held[1], held[2], held[3]
    finally:
        held[0].call_soon_threadsafe(done.set)
        thread.join(30)
