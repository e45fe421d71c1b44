"""What becomes of a request whose decoder or embeddings go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway.harness import (
    FakeDecoder,
    FakeEncoder,
    Stack,
    finished_event,
    png,
    running,
    tokens_event,
)

from chiasm import errors
from chiasm.client import AsyncClient, Sampling, image, user
from chiasm.services.gateway.decoders import MAX_RESUMES, PROGRESS
from chiasm.v1 import decoder_pb2, tensor_pb2

DecodeEvents = AsyncIterator[decoder_pb2.DecodeEvent]


async def test_dead_decoder_is_replaced_before_the_first_token(
    stack: Stack, client: AsyncClient
) -> None:
    first, second = await stack.add_decoder(), await stack.add_decoder()
    await stack.kill(first.address)
    result = await client.complete("x")
    assert result.finish_reason == "stop"
    assert len(second.requests) == 1


async def test_refusing_decoder_is_replaced_before_the_first_token(
    stack: Stack, client: AsyncClient
) -> None:
    decoders = [await stack.add_decoder(), await stack.add_decoder()]

    async def refuse(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        raise errors.ResourceExhausted("full", retry_after_s=1.0)
        yield

    chosen = min(decoders, key=lambda decoder: decoder.address)
    chosen.scripts.append(refuse)
    assert (await client.complete("x")).finish_reason == "stop"
    assert sorted(len(decoder.requests) for decoder in decoders) == [1, 1]


async def test_an_answer_outlives_its_decoder(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    """The next decoder is told what was generated, and asked for the rest alone."""

    async def script(request: decoder_pb2.DecodeRequest) -> DecodeEvents:
        for token_id in (5, 6):
            yield tokens_event(token_id)
        raise errors.Unavailable("gone")

    decoder.scripts.append(script)
    result = await client.complete("x", sampling=Sampling(seed=3))
    assert result.token_ids == (5, 6, 10, 11, 12)
    first, second = decoder.requests
    assert second.num_generated == 2
    assert list(second.token_ids) == [*first.token_ids, 5, 6]
    assert second.sampling.seed == first.sampling.seed == 3
    assert second.token_types == first.token_types


ENDINGS = pytest.mark.parametrize(
    ("ending", "reason", "retry_after_s"),
    [
        (errors.Unavailable("gone"), "DECODER_LOST", 1.0),
        (
            errors.Unavailable("x", reason="EXPERT_POOL_UNAVAILABLE", retry_after_s=5.0),
            "EXPERT_POOL_UNAVAILABLE",
            5.0,
        ),
        (errors.ResourceExhausted("full", retry_after_s=2.0), "RESOURCE_EXHAUSTED", 2.0),
    ],
)
"""How the last decoder ends, and what the client hears of it."""


@ENDINGS
async def test_a_request_does_not_go_through_all_decoders(
    ending: errors.ChiasmError,
    reason: str,
    retry_after_s: float,
    stack: Stack,
    decoder: FakeDecoder,
    client: AsyncClient,
) -> None:
    async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        yield tokens_event(5)
        raise ending

    decoder.scripts.extend([script] * 9)
    with pytest.raises(errors.ChiasmError) as caught:
        await client.complete("x")
    assert (caught.value.reason, caught.value.retry_after_s) == (reason, retry_after_s)
    assert len(decoder.requests) == 1 + MAX_RESUMES


async def test_an_answer_that_gets_on_outlives_more_of_them(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        yield tokens_event(*[5] * PROGRESS)
        raise errors.Unavailable("gone")

    decoder.scripts.extend([script] * (MAX_RESUMES + 2))
    result = await client.complete("x")
    assert len(result.token_ids) == (MAX_RESUMES + 2) * PROGRESS + 3


async def held(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
    raise errors.AlreadyExists("in flight")
    yield


async def test_a_decoder_that_still_holds_the_broken_call(tiny_checkpoint: Path) -> None:
    async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        yield tokens_event(5)
        raise errors.Unavailable("the connection broke")

    async with (
        running(tiny_checkpoint) as stack,
        AsyncClient(stack.address, timeout_s=20.0) as client,
    ):
        decoder = await stack.add_decoder()
        decoder.scripts.extend([script, held, held])
        assert (await client.complete("x")).token_ids == (5, 10, 11, 12)


async def test_an_id_that_somebody_else_has_at_the_decoder(
    decoder: FakeDecoder, client: AsyncClient
) -> None:
    decoder.scripts.append(held)
    with pytest.raises(errors.AlreadyExists):
        await client.complete("x")
    assert len(decoder.requests) == 1


@pytest.mark.parametrize("accepts", [True, False])
async def test_nor_does_one_that_kills_them_before_its_first_token(
    accepts: bool, stack: Stack, client: AsyncClient
) -> None:
    """Decoders that never had it in hand do not count: those it cannot have harmed."""
    decoders = [await stack.add_decoder() for _ in range(MAX_RESUMES + 3)]

    async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        raise errors.Unavailable("gone")
        yield

    for decoder in decoders:
        decoder.accepts = accepts
        decoder.scripts.append(script)
    if not accepts:
        assert (await client.complete("x")).token_ids == (10, 11, 12)
        return
    with pytest.raises(errors.Unavailable) as caught:
        await client.complete("x")
    assert caught.value.reason == "DECODER_LOST"
    assert sum(len(decoder.requests) for decoder in decoders) == 1 + MAX_RESUMES


async def test_two_decoders_wait_for_an_expert_pool_and_no_more(
    stack: Stack, client: AsyncClient
) -> None:
    decoders = [await stack.add_decoder() for _ in range(4)]

    async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        raise errors.Unavailable("away", reason="EXPERT_POOL_UNAVAILABLE", retry_after_s=5.0)
        yield

    for decoder in decoders:
        decoder.scripts.append(script)
    with pytest.raises(errors.Unavailable) as caught:
        await client.complete("x")
    assert (caught.value.reason, caught.value.retry_after_s) == ("EXPERT_POOL_UNAVAILABLE", 5.0)
    assert sum(len(decoder.requests) for decoder in decoders) == 2


@ENDINGS
async def test_decoder_lost_amid_the_prompts_logits(
    ending: errors.ChiasmError,
    reason: str,
    retry_after_s: float,
    stack: Stack,
    decoder: FakeDecoder,
    client: AsyncClient,
) -> None:
    """Some of them have been sent: there is no going on, and none to be sent twice."""

    async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        rows = tensor_pb2.Tensor(
            dtype=tensor_pb2.DTYPE_FLOAT32, shape=(1, 1), data=bytes(4), crc32c=0x48674BC7
        )
        chunk = tensor_pb2.TensorChunk(total_rows=9, rows=rows)
        yield decoder_pb2.DecodeEvent(prompt_logits=chunk)
        raise ending

    decoder.scripts.append(script)
    with pytest.raises(errors.ChiasmError) as caught:
        async for _ in client.generate("x"):
            pass
    assert (caught.value.reason, caught.value.retry_after_s) == (reason, retry_after_s)


async def test_embeddings_evicted_while_an_answer_resumes(
    stack: Stack, decoder: FakeDecoder, encoder: FakeEncoder, client: AsyncClient
) -> None:
    async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        yield tokens_event(5)
        raise errors.Unavailable("gone")

    decoder.scripts.extend([script, evicted])
    result = await client.complete([user(image(png()), "what?")])
    assert result.token_ids == (5, 10, 11, 12)
    assert [r.num_generated for r in decoder.requests] == [0, 1, 1]
    assert len(encoder.headers) == 2


async def test_work_is_spread_over_decoders(stack: Stack, client: AsyncClient) -> None:
    decoders = [await stack.add_decoder() for _ in range(3)]
    release = asyncio.Event()

    async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        await release.wait()
        yield finished_event()

    for decoder in decoders:
        decoder.scripts.extend([script] * 6)
    calls = [asyncio.create_task(client.complete("x")) for _ in range(6)]
    while sum(len(decoder.requests) for decoder in decoders) < 6:  # noqa: ASYNC110 - polls a fake
        await asyncio.sleep(0.01)
    assert [len(decoder.requests) for decoder in decoders] == [2, 2, 2]
    release.set()
    await asyncio.gather(*calls)


async def evicted(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
    raise errors.NotFound("evicted", reason="EMBEDDING_EVICTED")
    yield


@pytest.mark.parametrize("num_evictions", [1, 2])
async def test_evicted_embeddings_are_encoded_again(
    num_evictions: int,
    stack: Stack,
    decoder: FakeDecoder,
    encoder: FakeEncoder,
    client: AsyncClient,
) -> None:
    decoder.scripts.extend([evicted] * num_evictions)
    result = await client.complete([user(image(png()), "what?")])
    assert result.finish_reason == "stop"
    assert len(encoder.headers) == len(decoder.requests) == num_evictions + 1


async def test_eviction_without_end(
    stack: Stack, decoder: FakeDecoder, encoder: FakeEncoder, client: AsyncClient
) -> None:
    decoder.scripts.extend([evicted] * 9)
    with pytest.raises(errors.Unavailable) as caught:
        await client.complete([user(image(png()), "what?")])
    assert caught.value.reason == "EMBEDDING_EVICTED"
    assert caught.value.retry_after_s is not None
    assert len(decoder.requests) == 3


async def test_stream_without_end_event(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        yield tokens_event(5)

    decoder.scripts.append(script)
    with pytest.raises(errors.Internal):
        await client.complete("x")


async def test_no_decoder_parks_then_gives_up(stack: Stack, client: AsyncClient) -> None:
    with pytest.raises(errors.Unavailable) as caught:
        await client.complete("x")
    assert (caught.value.reason, caught.value.retry_after_s) == ("DECODER_UNAVAILABLE", 1.0)


async def test_parked_request_goes_on_when_the_decoder_comes(
    tiny_checkpoint: Path,
) -> None:
    async with (
        running(tiny_checkpoint) as stack,
        AsyncClient(stack.address, timeout_s=20.0) as client,
    ):
        call = asyncio.create_task(client.complete("x"))
        await asyncio.sleep(0.1)
        await stack.add_decoder()
        assert (await call).finish_reason == "stop"
