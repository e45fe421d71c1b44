"""Embeddings fetched from a scripted encoder over loopback grpc, and when a decoder does so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from nonsense import NONSENSE, nonsense

from chiasm import errors
from chiasm.model.config import ModelConfig
from chiasm.services.decoder.embeddings import EmbeddingStore
from chiasm.services.decoder.servicer import DecoderServicer
from chiasm.transport import tensors
from chiasm.transport.interceptors import CallInterceptor
from chiasm.v1 import common_pb2, decoder_pb2, encoder_pb2, encoder_pb2_grpc, tensor_pb2

HIDDEN = 8
DIGEST = "ab" * 32
WAIT_S = 10


class FakeEncoder(encoder_pb2_grpc.VisionEncoderServicer):
    """Has `num_rows` rows of every digest; those of "held" are not whole before `go_on` is set,
    and it is away for "away"."""

    def __init__(self) -> None:
        self.num_rows, self.num_fetches = 4, 0
        self.go_on, self.begun = asyncio.Event(), asyncio.Event()

    async def Fetch(
        self, request: encoder_pb2.FetchRequest, context: Any
    ) -> AsyncIterator[tensor_pb2.TensorChunk]:
        self.num_fetches += 1
        if request.digest == "away":
            raise errors.Unavailable("shutting down")
        for row in range(self.num_rows):
            rows = tensors.to_wire(torch.full((1, HIDDEN), float(row)))
            yield tensor_pb2.TensorChunk(row_offset=row, total_rows=self.num_rows, rows=rows)
            if request.digest == "held":
                self.begun.set()
                await self.go_on.wait()


@pytest.fixture
async def encoder() -> AsyncIterator[FakeEncoder]:
    encoder, server = FakeEncoder(), grpc.aio.server(interceptors=[CallInterceptor()])
    encoder_pb2_grpc.add_VisionEncoderServicer_to_server(encoder, server)
    encoder.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield encoder
    await server.stop(None)


def new_store(budget_bytes: int = 1 << 20) -> EmbeddingStore:
    return EmbeddingStore(
        hidden_size=HIDDEN, budget_bytes=budget_bytes, timeout_s=WAIT_S, max_message_bytes=1 << 20
    )


def ref(encoder: FakeEncoder, digest: str = DIGEST) -> decoder_pb2.MediaRef:
    return decoder_pb2.MediaRef(
        digest=digest,
        kind=common_pb2.MEDIA_KIND_IMAGE,
        num_tokens=encoder.num_rows,
        encoder_address=encoder.address,
    )


async def test_embeddings_of_other_settings_are_fetched_anew(encoder: FakeEncoder) -> None:
    store = new_store()
    assert len(await store.get(ref(encoder), "")) == 4
    encoder.num_rows = 6  # restarted with another preprocessor_config.json
    assert len(await store.get(ref(encoder), "")) == 6
    await store.close()


async def test_number_that_no_encoder_has_is_refused(encoder: FakeEncoder) -> None:
    store, wrong = new_store(), ref(encoder)
    wrong.num_tokens += 1
    with pytest.raises(errors.InvalidArgument) as caught:
        await store.get(wrong, "")
    assert caught.value.field == "media.num_tokens"
    await store.close()


async def test_embeddings_in_use_are_shared_beyond_the_cache(encoder: FakeEncoder) -> None:
    store = new_store(budget_bytes=0)
    first = await store.get(ref(encoder), "")
    assert await store.get(ref(encoder), "") is first
    del first
    await asyncio.sleep(0)  # the event loop lets go of it, too
    await store.get(ref(encoder), "")
    assert encoder.num_fetches == 2
    await store.close()


async def test_failed_fetch_leaves_others_of_its_channel_alone(encoder: FakeEncoder) -> None:
    store = new_store()
    other = asyncio.create_task(store.get(ref(encoder, "held"), ""))
    await asyncio.wait_for(encoder.begun.wait(), WAIT_S)
    with pytest.raises(errors.NotFound) as caught:
        await store.get(ref(encoder, "away"), "")
    assert caught.value.reason == errors.EMBEDDING_EVICTED
    assert len(await store.get(ref(encoder), "")) == 4, "on a new channel"
    encoder.go_on.set()
    assert len(await asyncio.wait_for(other, WAIT_S)) == 4
    await store.close()


async def test_fetch_that_is_cancelled_is_told_to_who_waits(encoder: FakeEncoder) -> None:
    store = new_store()
    waiter = asyncio.create_task(store.get(ref(encoder, "held"), ""))
    await asyncio.wait_for(encoder.begun.wait(), WAIT_S)
    await store.close()
    with pytest.raises(errors.NotFound) as caught:
        await asyncio.wait_for(waiter, WAIT_S)
    assert caught.value.reason == errors.EMBEDDING_EVICTED


class FullEngine:
    """Has no room."""

    def check_room(self, num_coming: int) -> None:
        raise errors.ResourceExhausted("the decoder's queue is full", retry_after_s=1.0)


class Context:
    def set_trailing_metadata(self, metadata: Any) -> None:
        pass

    async def send_initial_metadata(self, metadata: Any) -> None:
        pass


async def test_full_decoder_refuses_before_it_fetches(
    encoder: FakeEncoder, tiny_checkpoint: Path
) -> None:
    store, no_grammars, engine = new_store(), None, FullEngine()
    servicer = DecoderServicer(ModelConfig.load(tiny_checkpoint), store, no_grammars)
    servicer.engine = engine
    request = decoder_pb2.DecodeRequest(
        request_id="a", token_ids=[5] * 4, token_types=bytes([1] * 4), media=[ref(encoder)]
    )
    with pytest.raises(errors.ResourceExhausted, match="queue is full"):
        await anext(servicer.Decode(request, Context()))
    assert encoder.num_fetches == 0
    await store.close()


async def test_nonsense_instead_of_rows_is_data_loss() -> None:
    async with nonsense("chiasm.v1.VisionEncoder", {"Fetch": NONSENSE}) as address:
        store = new_store()
        wanted = decoder_pb2.MediaRef(digest=DIGEST, num_tokens=4, encoder_address=address)
        with pytest.raises(errors.DataLoss, match="not a message"):
            await store.get(wanted, "")
        await store.close()
