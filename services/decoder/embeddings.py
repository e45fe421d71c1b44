"""Media embeddings by digest: fetched once from the encoder, kept in a bounded cache."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary

import grpc
import torch

from chiasm import errors
from chiasm.cache import ByteLRU
from chiasm.telemetry import metrics, traces
from chiasm.transport import status, tensors
from chiasm.transport.channel import open_channel
from chiasm.v1 import decoder_pb2, encoder_pb2, encoder_pb2_grpc, tensor_pb2

_ENCODER_AWAY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,  # by the encoder, at the end of its drain
)


class EmbeddingStore:
    """Used from the event loop only. Concurrent fetches of one item share one stream, and whoever
    holds its embeddings shares them with later ones, whether they stay in the cache or not."""

    def __init__(
        self, *, hidden_size: int, budget_bytes: int, timeout_s: float, max_message_bytes: int
    ) -> None:
        self._hidden_size, self._timeout_s = hidden_size, timeout_s
        self._max_message_bytes = max_message_bytes
        self._cache: ByteLRU[torch.Tensor] = ByteLRU(budget_bytes)
        self._held: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()
        self._fetching: dict[str, asyncio.Task[torch.Tensor]] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def get(self, ref: decoder_pb2.MediaRef, request_id: str) -> torch.Tensor:
        """Embeddings [ref.num_tokens, H].

        Raises NotFound (EMBEDDING_EVICTED) when the encoder no longer has them or is away: encoding
        again, elsewhere if need be, is the way out of both.
        """
        key = _key(ref)
        found = self._cache.get(key)
        if found is None:
            found = self._held.get(key)
        task = self._fetching.get(key)
        is_miss = found is None and task is None
        (metrics.EMBEDDINGS_MISSES if is_miss else metrics.EMBEDDINGS_HITS).inc()
        if found is None:
            found = await self._shared(task or self._begin(ref, request_id), ref)
        return found

    async def close(self) -> None:
        """Closes the channels."""
        await asyncio.gather(*(channel.close(None) for channel in self._channels.values()))
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def _shared(
        self, task: asyncio.Task[torch.Tensor], ref: decoder_pb2.MediaRef
    ) -> torch.Tensor:
        """A fetch's result. A waiter that goes away must not take the others' fetch with it."""
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            raise errors.NotFound(
                f"the channel to the encoder at {ref.encoder_address} was closed",
                reason=errors.EMBEDDING_EVICTED,
            ) from None

    def _begin(self, ref: decoder_pb2.MediaRef, request_id: str) -> asyncio.Task[torch.Tensor]:
        key, task = _key(ref), asyncio.create_task(self._fetch(ref, request_id))
        self._fetching[key] = task
        task.add_done_callback(lambda _: self._fetching.pop(key, None))
        return task

    async def _fetch(self, ref: decoder_pb2.MediaRef, request_id: str) -> torch.Tensor:
        attributes = {
            **traces.peer(ref.encoder_address),
            "chiasm.media.digest": ref.digest,
            "chiasm.media.tokens": ref.num_tokens,
        }
        with traces.span("fetch embeddings", kind=traces.CLIENT, attributes=attributes):
            stub = encoder_pb2_grpc.VisionEncoderStub(self._channel(ref.encoder_address))
            call = stub.Fetch(
                encoder_pb2.FetchRequest(digest=ref.digest),
                timeout=self._timeout_s,
                metadata=traces.metadata(request_id),
            )
            try:
                rows = [self._rows(chunk, ref) async for chunk in call]
            except grpc.RpcError as error:
                raise self._failure(ref, error) from None
        embeddings = torch.cat(rows) if rows else torch.empty(0, self._hidden_size)
        _check_count(ref, len(embeddings))
        self._held[_key(ref)] = embeddings
        self._cache.put(_key(ref), embeddings, embeddings.nbytes)
        metrics.EMBEDDINGS_BYTES.set(self._cache.num_bytes)
        return embeddings

    def _failure(self, ref: decoder_pb2.MediaRef, error: grpc.RpcError) -> errors.ChiasmError:
        if error.code() not in _ENCODER_AWAY:
            return status.from_rpc_error(error)
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            self._retire(ref.encoder_address)
        return errors.NotFound(
            f"the encoder at {ref.encoder_address} is away: {error.details()}",
            reason=errors.EMBEDDING_EVICTED,
        )

    def _rows(
        self, message: tensor_pb2.TensorChunk | None, ref: decoder_pb2.MediaRef
    ) -> torch.Tensor:
        chunk = status.parsed(message, ref.encoder_address)
        _check_count(ref, chunk.total_rows)
        rows = tensors.from_wire(chunk.rows, name="rows")
        if rows.ndim != 2 or rows.shape[1] != self._hidden_size:
            raise errors.DataLoss(f"the encoder sent rows of shape {tuple(rows.shape)}")
        return rows

    def _retire(self, address: str) -> None:
        """The next fetch opens a channel anew; those on the old one may still end."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            task = asyncio.create_task(channel.close(self._timeout_s))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = open_channel(
                address, max_message_bytes=self._max_message_bytes
            )
        return self._channels[address]


def _key(ref: decoder_pb2.MediaRef) -> str:
    """What embeddings are kept by: encoders with other settings make another number of the same
    file."""
    return f"{ref.digest} {ref.num_tokens}"


def _check_count(ref: decoder_pb2.MediaRef, num_rows: int) -> None:
    if num_rows != ref.num_tokens:
        raise errors.InvalidArgument(
            "media.num_tokens", f"{ref.num_tokens}, but the encoder has {num_rows}"
        )
