"""Media to embeddings: which encoder takes an item, the upload, and what to do when one is away.

An item goes to the ready encoder that wins the rendezvous hash of its digest, so that a repeated
item finds its embeddings where they were made, and only the share of an encoder that comes or goes
moves. Encoding is pure, so a failed try is repeated on the next encoder until the time is up.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence

import grpc
import structlog

from chiasm import errors
from chiasm.membership import MemberInfo
from chiasm.services.gateway.channels import Channels
from chiasm.services.gateway.deadline import Deadline
from chiasm.services.gateway.domain import Encoded, MediaItem
from chiasm.services.gateway.members import (
    BrokenOff,
    MemberSearch,
    Waiting,
    call_error,
    may_try_another,
)
from chiasm.telemetry import traces
from chiasm.transport import status
from chiasm.transport.enums import WIRE_MEDIA_KINDS
from chiasm.transport.membership import TopologyWatcher
from chiasm.types import Grid, MediaKind
from chiasm.v1 import encoder_pb2, encoder_pb2_grpc

CHUNK_BYTES = 256 * 1024
"""Size of an upload's chunks: small beside the message bound, large beside the framing."""

MAX_BREAKS = 3
"""Encoders one item may outlive. A file that brings encoders down must not go through all."""

log = structlog.get_logger()


def rank(digest: str, encoders: Sequence[MemberInfo]) -> list[MemberInfo]:
    """Encoders in the order in which they are tried for an item (highest random weight first)."""

    def weight(encoder: MemberInfo) -> bytes:
        return hashlib.sha256(f"{digest}\0{encoder.address}".encode()).digest()

    return sorted(encoders, key=weight, reverse=True)


class Encoders:
    """The vision encoders as one. `num_items` counts the items asked for since the start."""

    def __init__(
        self,
        topology: TopologyWatcher,
        channels: Channels,
        *,
        park_timeout_s: float,
        max_concurrent: int,
        retry_after_s: float,
    ) -> None:
        self._topology, self._channels = topology, channels
        self.waiting, self.num_items = Waiting(), 0
        self._park_timeout_s, self._max_concurrent = park_timeout_s, max_concurrent
        self._retry_after_s = retry_after_s

    async def encode(
        self, items: Sequence[MediaItem], *, request_id: str, deadline: Deadline
    ) -> list[Encoded]:
        """Encodes all items at the same time, repeated ones once; results in the items' order.

        Raises the first error: InvalidArgument with the item's field, Unavailable when no encoder
        came back in time, DeadlineExceeded.
        """
        slots = asyncio.Semaphore(self._max_concurrent)

        async def encode_one(item: MediaItem) -> Encoded:
            async with slots:
                return await self._encode(item, request_id=request_id, deadline=deadline)

        self.num_items += len(items)
        distinct = {item.digest: item for item in reversed(items)}
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {d: group.create_task(encode_one(item)) for d, item in distinct.items()}
        except* errors.ChiasmError as failed:
            raise _first(failed) from None
        return [tasks[item.digest].result() for item in items]

    async def _encode(self, item: MediaItem, *, request_id: str, deadline: Deadline) -> Encoded:
        search = MemberSearch(
            self._topology,
            lambda topology: topology.encoders(),
            unavailable=errors.Unavailable(
                "no vision encoder is available",
                reason="ENCODER_UNAVAILABLE",
                retry_after_s=self._retry_after_s,
            ),
            park_timeout_s=self._park_timeout_s,
            deadline=deadline,
            waiting=self.waiting,
        )
        breaks_left = MAX_BREAKS
        while True:
            encoder = rank(item.digest, await search.candidates())[0]
            try:
                return await self._try(encoder, item, request_id=request_id, deadline=deadline)
            except errors.ChiasmError as error:
                if not may_try_another(error):
                    raise
                if isinstance(error, BrokenOff):
                    if not breaks_left:
                        raise self._lost(error) from None
                    breaks_left -= 1
                log.warning("encoder_away", encoder=encoder.address, error=error.message[:256])
                search.failed(encoder, error)

    def _lost(self, error: errors.ChiasmError) -> errors.Unavailable:
        return errors.Unavailable(
            f"encoders were lost while they encoded the item: {error.message}",
            reason="ENCODER_LOST",
            retry_after_s=self._retry_after_s,
        )

    async def _try(
        self, encoder: MemberInfo, item: MediaItem, *, request_id: str, deadline: Deadline
    ) -> Encoded:
        with traces.span(
            f"encode {item.kind}",
            kind=traces.CLIENT,
            attributes={**traces.peer(encoder.address), "chiasm.media.bytes": len(item.data)},
        ) as span:
            stub = encoder_pb2_grpc.VisionEncoderStub(self._channels.get(encoder.address))
            upload = _Upload(item)
            call = stub.Encode(
                upload.parts(), timeout=deadline.remaining_s(), metadata=traces.metadata(request_id)
            )
            try:
                result = status.parsed(await call, encoder.address)
            except grpc.RpcError as failure:
                raise _translated(await call_error(call, failure), item) from None
            finally:
                upload.stop()
            grid = Grid(result.grid.t, result.grid.h, result.grid.w)
            span.set_attributes(
                {"chiasm.media.tokens": result.num_tokens, "chiasm.media.cached": result.cached}
            )
        return Encoded(
            digest=item.digest,
            kind=item.kind,
            grid=grid,
            num_tokens=result.num_tokens,
            encoder_address=encoder.address,
        )


class _Upload:
    """The request stream of one Encode call; ends early once the encoder has answered."""

    def __init__(self, item: MediaItem) -> None:
        self._item, self._stopped = item, False

    def stop(self) -> None:
        self._stopped = True

    async def parts(self) -> AsyncIterator[encoder_pb2.EncodeRequest]:
        item = self._item
        header = encoder_pb2.EncodeHeader(
            digest=item.digest, kind=WIRE_MEDIA_KINDS[item.kind], size_bytes=len(item.data)
        )
        yield encoder_pb2.EncodeRequest(header=header)
        for start in range(0, len(item.data), CHUNK_BYTES):
            if self._stopped:
                return
            yield encoder_pb2.EncodeRequest(chunk=item.data[start : start + CHUNK_BYTES])


def _translated(error: errors.ChiasmError, item: MediaItem) -> errors.ChiasmError:
    """The encoder's error in the words of the client's request."""
    if not isinstance(error, errors.InvalidArgument):
        return error
    if error.field in (*MediaKind, "header.size_bytes"):
        return errors.InvalidArgument(item.field, error.description)
    return errors.Internal(f"the vision encoder refused the upload: {error.message}")


def _first(group: BaseExceptionGroup[errors.ChiasmError]) -> errors.ChiasmError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, errors.ChiasmError)
    return error
