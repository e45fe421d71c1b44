"""VisionEncoder over gRPC: decode, call the engine, encode."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from chiasm import errors
from chiasm.services.vision_encoder.domain import Encoded
from chiasm.services.vision_encoder.engine import EncoderEngine
from chiasm.services.vision_encoder.upload import Header, Uploads, next_part
from chiasm.telemetry import traces
from chiasm.transport import loads, tensors
from chiasm.transport.accepted import accept
from chiasm.types import MediaKind
from chiasm.v1 import common_pb2, encoder_pb2, encoder_pb2_grpc, tensor_pb2

Context = grpc.aio.ServicerContext[Any, Any]

MAX_MESSAGE_BYTES = 4 << 20
"""Bound of one message: a chunk of an upload, or a chunk of embeddings."""

FETCH_CHUNK_BYTES = 1 << 20
"""Embeddings travel in chunks of as many rows as fit this; one row always does."""

log = structlog.get_logger()


class VisionEncoderServicer(encoder_pb2_grpc.VisionEncoderServicer):
    """Answers UNAVAILABLE until `engine` is set."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self._is_draining = False
        self.engine: EncoderEngine | None = None

    async def Encode(
        self,
        requests: AsyncIterator[encoder_pb2.EncodeRequest],
        context: Context,
    ) -> encoder_pb2.EncodeResult:
        engine = self._loaded()
        if self._is_draining:
            raise errors.Unavailable("server is draining", reason=errors.DRAINING)
        parts = aiter(requests)
        header = self._uploads.header(await next_part(parts))
        with traces.span(f"encode {header.kind}", kind=traces.SERVER) as span:
            span.set_attribute("chiasm.media.digest", header.digest)
            encoded = await engine.find(header.digest)
            if encoded is None:
                encoded = await self._upload(engine, header, parts, context)
            span.set_attributes(
                {
                    "chiasm.media.patches": encoded.grid.num_patches,
                    "chiasm.media.tokens": encoded.num_tokens,
                    "chiasm.media.cached": encoded.cached,
                }
            )
        _log(header.kind, encoded)
        return _to_wire(encoded)

    async def Fetch(
        self, request: encoder_pb2.FetchRequest, context: Context
    ) -> AsyncIterator[tensor_pb2.TensorChunk]:
        with traces.span("fetch embeddings", kind=traces.SERVER) as span:
            span.set_attribute("chiasm.media.digest", request.digest)
            embeddings = self._loaded().embeddings(request.digest)
            num_rows = len(embeddings)
            step = max(FETCH_CHUNK_BYTES // (embeddings.nbytes // num_rows), 1)
            for start in range(0, num_rows, step):
                yield tensor_pb2.TensorChunk(
                    row_offset=start,
                    total_rows=num_rows,
                    rows=tensors.to_wire(embeddings[start : start + step]),
                )

    async def GetLoad(
        self, request: encoder_pb2.GetEncoderLoadRequest, context: Context
    ) -> encoder_pb2.EncoderLoad:
        return loads.encoder_to_proto(self._loaded().load())

    async def drain(self) -> None:
        """Refuses new items and waits for those under way; embeddings may still be fetched."""
        self._is_draining = True
        if self.engine is not None:
            await self.engine.wait_idle()

    async def close(self) -> None:
        """Ends the engine."""
        if self.engine is not None:
            await self.engine.close()

    def _loaded(self) -> EncoderEngine:
        if self.engine is None:
            raise errors.Unavailable("the model is being loaded", retry_after_s=1.0)
        return self.engine

    async def _upload(
        self,
        engine: EncoderEngine,
        header: Header,
        parts: AsyncIterator[encoder_pb2.EncodeRequest],
        context: Context,
    ) -> Encoded:
        engine.check_queue()  # before the file has come in vain
        with self._uploads.reserve(header.size_bytes):
            file = await self._uploads.receive(header, parts)
            await accept(context)
            return await engine.encode(header.digest, header.kind, file)


def _log(kind: MediaKind, encoded: Encoded) -> None:
    log.info(
        "encoded",
        digest=encoded.digest,
        kind=kind,
        patches=encoded.grid.num_patches,
        tokens=encoded.num_tokens,
        cached=encoded.cached,
        queue_ms=round(encoded.queue_ns / 1e6, 3),
        preprocess_ms=round(encoded.preprocess_ns / 1e6, 3),
        compute_ms=round(encoded.compute_ns / 1e6, 3),
    )


def _to_wire(encoded: Encoded) -> encoder_pb2.EncodeResult:
    grid = encoded.grid
    return encoder_pb2.EncodeResult(
        digest=encoded.digest,
        grid=common_pb2.GridThw(t=grid.t, h=grid.h, w=grid.w),
        num_tokens=encoded.num_tokens,
        cached=encoded.cached,
        queue_ns=encoded.queue_ns,
        preprocess_ns=encoded.preprocess_ns,
        compute_ns=encoded.compute_ns,
    )
