"""Generations through the gateway: events, text, hand-over to other decoders, cancellation."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateway.harness import (
    GRIDS,
    TOKENS,
    FakeDecoder,
    FakeEncoder,
    Script,
    Stack,
    finished_event,
    png,
    running,
    tokens_event,
)
from google_crc32c import value as crc32c
from prometheus_client import REGISTRY

from chiasm import errors
from chiasm.client import AsyncClient, Delta, Sampling, Tokens, image, user
from chiasm.services.gateway import media as media_rules
from chiasm.types import MediaKind
from chiasm.v1 import common_pb2, decoder_pb2, tensor_pb2

DecodeEvents = AsyncIterator[decoder_pb2.DecodeEvent]


def _failed(reason: str) -> float:
    return REGISTRY.get_sample_value("chiasm_requests_failed_total", {"reason": reason}) or 0.0


async def comes(condition: Callable[[], object]) -> bool:
    """Whether it holds within a moment."""
    for _ in range(200):
        if condition():
            return True
        await asyncio.sleep(0.01)
    return False


def ids(stack: Stack, text: str) -> list[int]:
    return stack.tokenizer.encode(text)


async def test_priority_travels_to_the_decoder(decoder: FakeDecoder, client: AsyncClient) -> None:
    for priority in (0, -3, 2**31 - 1):
        await client.complete("x", sampling=Sampling(n=2), priority=priority)
        assert [r.priority for r in decoder.requests] == [priority] * 2
        decoder.requests.clear()
    for wrong in (2**31, 1.5):
        with pytest.raises(errors.InvalidArgument) as caught:
            await client.complete("x", priority=wrong)  # type: ignore[arg-type]  # wrong on purpose
        assert caught.value.field == "priority"


async def test_text_request(stack: Stack, decoder: FakeDecoder, client: AsyncClient) -> None:
    decoder.token_ids = [*ids(stack, "The answer is yes."), 2]
    result = await client.complete(
        "Hello!", sampling=Sampling(temperature=0, seed=7, top_k=3), request_id="my-id"
    )
    assert result.text == "The answer is yes."
    assert list(result.token_ids) == decoder.token_ids
    assert (result.request_id, result.model, result.finish_reason) == ("my-id", "tiny", "stop")
    sent = decoder.requests[0]
    assert list(sent.token_ids) == list(result.prompt_token_ids)
    assert sent.token_types == bytes(len(sent.token_ids))
    assert (sent.sampling.temperature, sent.sampling.seed, sent.sampling.top_k) == (0, 7, 3)
    assert sent.sampling.max_tokens == 0
    assert result.usage.prompt_tokens == result.usage.prompt_text_tokens == len(sent.token_ids)
    assert result.usage.completion_tokens == len(decoder.token_ids)
    assert (result.timings.prefill_ns, result.timings.decode_ns) == (7, 9)
    assert result.timings.total_ns > result.timings.layout_ns > 0
    assert result.timings.encode_ns == 0


async def test_cached_tokens_are_those_of_the_first_decoder(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    def script(num_cached: int, is_lost: bool) -> Script:
        async def answer(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
            event = tokens_event(5)
            event.tokens.cached_tokens = num_cached
            yield event
            yield tokens_event(6)
            if is_lost:
                raise errors.Unavailable("gone")
            yield finished_event()

        return answer

    decoder.scripts.extend([script(16, True), script(32, False)])
    result = await client.complete("Hello!")
    assert len(result.token_ids) == 4
    assert result.usage.cached_tokens == 16
    decoder.scripts.extend([script(3, False), script(48, False)])
    result = await client.complete("Hello!", sampling=Sampling(n=2))
    assert (result.usage.cached_tokens, result.usage.completion_tokens) == (3, 4)


async def test_a_chat_whose_text_is_too_long_is_refused_before_its_media_are_encoded(
    tiny_checkpoint: Path,
) -> None:
    async with (
        running(tiny_checkpoint) as stack,
        AsyncClient(stack.address, timeout_s=20.0) as client,
    ):
        encoder = await stack.add_encoder()
        long = [user(image(png()), "word " * 5000)]
        with pytest.raises(errors.InvalidArgument) as caught:
            await client.complete(long)
        assert caught.value.field == "chat.messages"
        assert not encoder.headers
        assert (await client.count_tokens(long)).prompt_tokens > 4096


async def test_max_tokens_ends_with_length(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    result = await client.complete("Hello!", sampling=Sampling(max_tokens=2))
    assert (result.finish_reason, len(result.token_ids)) == ("length", 2)


@pytest.mark.parametrize("text", ["図片🙂 ok", "naïve é", "🙂"])
async def test_partial_characters_are_held_back(
    text: str, stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    decoder.token_ids = ids(stack, text)
    assert len(decoder.token_ids) > 1
    deltas = [e async for e in client.generate("x") if isinstance(e, Delta)]
    assert "".join(delta.text for delta in deltas) == text
    assert all("\ufffd" not in delta.text for delta in deltas)


async def test_unfinished_character_is_flushed(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    decoder.token_ids = ids(stack, "🙂")[:-1]
    result = await client.complete("x")
    assert result.text == stack.tokenizer.decode(decoder.token_ids)
    assert result.text.endswith("\ufffd")


async def test_stop_token_is_counted_but_not_text(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    decoder.token_ids = ids(stack, "The answer")
    stop = decoder.token_ids[-1]
    result = await client.complete("x", sampling=Sampling(stop_token_ids=[stop]))
    assert list(result.token_ids) == decoder.token_ids
    assert result.text == stack.tokenizer.decode(decoder.token_ids[:-1])


async def test_media_are_laid_out(
    stack: Stack, decoder: FakeDecoder, encoder: FakeEncoder, client: AsyncClient
) -> None:
    data, tokens = png(), stack.config.tokens
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    result = await client.complete([user(image(data), "and", image(png(50, 50)), image(uri))])
    sent = decoder.requests[0]
    assert len(encoder.headers) == 2  # the repeated image is encoded once
    assert [m.digest for m in sent.media][0::2] == [media_rules.digest(MediaKind.IMAGE, data)] * 2
    for ref in sent.media:
        assert (ref.kind, ref.encoder_address) == (common_pb2.MEDIA_KIND_IMAGE, encoder.address)
        assert (ref.grid, ref.num_tokens) == (GRIDS[ref.kind], TOKENS[ref.kind])
        end = ref.offset + ref.num_tokens
        assert set(sent.token_ids[ref.offset : end]) == {tokens.image}
        assert sent.token_ids[ref.offset - 1] == tokens.image_start
        assert sent.token_types[ref.offset - 1 : end + 1] == b"\1" * (ref.num_tokens + 2)
    assert result.usage.prompt_image_tokens == 18
    assert result.usage.prompt_video_tokens == 0
    assert result.usage.prompt_text_tokens == len(sent.token_ids) - 18
    assert result.timings.encode_ns > 0


async def test_tokenised_prompt_and_count_agree(
    stack: Stack, decoder: FakeDecoder, encoder: FakeEncoder, client: AsyncClient
) -> None:
    tokens = stack.config.tokens
    wrapped = [9, tokens.image_start, tokens.image, tokens.image_end, 8]
    prompt = Tokens(token_ids=wrapped, images=[image(png())])
    result = await client.complete(prompt)
    expected = [9, tokens.image_start, *[tokens.image] * 6, tokens.image_end, 8]
    assert list(result.prompt_token_ids) == expected
    usage = await client.count_tokens(prompt)
    assert (usage.prompt_tokens, usage.prompt_image_tokens) == (10, 6)
    assert len(decoder.requests) == 1


async def test_prompt_logits_pass_through(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    logits = np.arange(12, dtype=np.float32).reshape(4, 3)

    async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        for start in (0, 3):
            rows = logits[start : start + 3]
            data = rows.tobytes()
            wire = tensor_pb2.Tensor(
                dtype=tensor_pb2.DTYPE_FLOAT32, shape=rows.shape, data=data, crc32c=crc32c(data)
            )
            chunk = tensor_pb2.TensorChunk(row_offset=start, total_rows=4, rows=wire)
            yield decoder_pb2.DecodeEvent(prompt_logits=chunk)
        yield tokens_event(5)
        yield finished_event()

    decoder.scripts.append(script)
    result = await client.complete("x", prompt_logits=True)
    assert decoder.requests[0].prompt_logits
    assert result.prompt_logits is not None
    np.testing.assert_array_equal(result.prompt_logits, logits)


async def test_request_id_trace_and_deadline_travel(
    stack: Stack, decoder: FakeDecoder, encoder: FakeEncoder, stub: Any
) -> None:
    from gateway.test_validation import chat
    from gateway.test_validation import image as part

    request = chat(part(png()))
    request.request_id = "travels"
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    metadata = (("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"),)
    async for _ in stub.Generate(request, timeout=15, metadata=metadata):
        pass
    for seen in (decoder.metadata[0], encoder.metadata[0]):
        assert seen["x-request-id"] == "travels"
        assert seen["traceparent"].split("-")[1] == trace_id
    left_s = decoder.time_left_s[0]
    assert left_s is not None
    assert 0 < left_s <= 15


async def test_too_many_in_flight(tiny_checkpoint: Path) -> None:
    async with running(tiny_checkpoint, max_in_flight=1) as stack:
        decoder = await stack.add_decoder()
        release = asyncio.Event()

        async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
            await release.wait()
            yield finished_event()

        decoder.scripts.append(script)
        async with AsyncClient(stack.address, timeout_s=20.0) as client:
            first = client.generate("x")
            await anext(first)
            with pytest.raises(errors.ResourceExhausted) as caught:
                await client.complete("x")
            assert caught.value.retry_after_s == 1.0
            release.set()
            assert [e async for e in first]


async def test_client_that_leaves_cancels_the_decoder(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        yield tokens_event(5)
        await asyncio.sleep(60)

    before = _failed("CANCELLED")
    decoder.scripts.append(script)
    events = client.generate("x")
    await anext(events)
    await anext(events)
    await events.aclose()  # type: ignore[attr-defined]
    await asyncio.wait_for(decoder.cancelled.wait(), 5)
    assert await comes(lambda: _failed("CANCELLED") == before + 1)


async def test_client_that_does_not_read_and_leaves(
    stack: Stack, decoder: FakeDecoder, client: AsyncClient
) -> None:
    """The gateway is cancelled while it writes, not while it waits for the decoder."""
    num_sent = 0

    async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
        nonlocal num_sent
        chunk = tensor_pb2.TensorChunk(rows=tensor_pb2.Tensor(data=bytes(1 << 18)))
        for num_sent in range(1, 10_000):  # noqa: B007 - counts what flow control lets through
            yield decoder_pb2.DecodeEvent(prompt_logits=chunk)

    decoder.scripts.append(script)
    events = client.generate("x", request_id="slow")
    await anext(events)
    last = -1
    while num_sent != last or not num_sent:
        last = num_sent
        await asyncio.sleep(0.2)
    assert num_sent < 9_999
    await events.aclose()  # type: ignore[attr-defined]
    for _ in range(100):
        try:
            await client.complete("x", request_id="slow")
            return
        except errors.AlreadyExists:
            await asyncio.sleep(0.02)
    pytest.fail("the id is still held")


async def test_a_deadline_that_is_over_ends_the_call(
    decoder: FakeDecoder, client: AsyncClient
) -> None:
    """Of a client with a default of its own as well, and for calls of every kind."""
    for timeout_s in (0.0, -1.0):
        with pytest.raises(errors.DeadlineExceeded):
            await client.complete("x", timeout_s=timeout_s)
        with pytest.raises(errors.DeadlineExceeded):
            await client.count_tokens("x", timeout_s=timeout_s)
    assert not decoder.requests


async def test_a_deadline_that_is_over_when_the_call_arrives(
    stack: Stack, decoder: FakeDecoder
) -> None:
    """chiasm's client sends no such call; those of other languages may."""
    from gateway.test_validation import chat, refusal, text

    from chiasm.transport.channel import open_channel
    from chiasm.v1 import inference_pb2_grpc

    async with open_channel(stack.address, max_message_bytes=1 << 20) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        late = stub.Generate(chat(text("x")), metadata=(("grpc-timeout", "1n"),))
        error = await asyncio.wait_for(refusal(late), 10)
    assert isinstance(error, errors.DeadlineExceeded)
    await asyncio.sleep(0.1)
    assert not decoder.requests


async def test_deadline_cancels_the_encoder(
    stack: Stack, decoder: FakeDecoder, encoder: FakeEncoder, client: AsyncClient
) -> None:
    encoder.is_stuck = True
    before = _failed("DEADLINE_EXCEEDED")
    # A gateway that hears of a call late has time left when the client gives up.
    for _ in range(3):
        encoder.cancelled.clear()
        with pytest.raises(errors.DeadlineExceeded):
            await client.complete([user(image(png()))], timeout_s=2.0)
        await asyncio.wait_for(encoder.cancelled.wait(), 5)
        if await comes(lambda: _failed("DEADLINE_EXCEEDED") == before + 1):
            break
    assert _failed("DEADLINE_EXCEEDED") == before + 1
    assert not decoder.requests


async def test_answers_are_announced_before_their_media_are_encoded(
    stack: Stack, decoder: FakeDecoder, encoder: FakeEncoder, client: AsyncClient
) -> None:
    await client.complete("Hello!", sampling=Sampling(n=2))
    load = stack.engine.load()
    assert (load.plain_answers_total, load.media_answers_total) == (2, 0)
    encoder.is_stuck = True
    call = asyncio.create_task(client.complete([user(image(png()))], sampling=Sampling(n=3)))
    assert await comes(lambda: encoder.headers)
    load = stack.engine.load()
    assert (load.plain_answers_total, load.media_answers_total) == (2, 3)
    call.cancel()
    await asyncio.wait([call])


async def test_gateway_sets_a_deadline_itself(tiny_checkpoint: Path) -> None:
    from gateway.test_validation import chat, refusal, text

    from chiasm.transport.channel import open_channel
    from chiasm.v1 import inference_pb2_grpc

    async with running(tiny_checkpoint, default_timeout_s=2.0) as stack:
        decoder = await stack.add_decoder()

        async def script(_: decoder_pb2.DecodeRequest) -> DecodeEvents:
            await asyncio.sleep(60)
            yield finished_event()

        decoder.scripts.append(script)
        async with open_channel(stack.address, max_message_bytes=1 << 20) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            error = await asyncio.wait_for(refusal(stub.Generate(chat(text("x")))), 10)
        assert isinstance(error, errors.DeadlineExceeded)
        await asyncio.wait_for(decoder.cancelled.wait(), 5)


async def test_get_model(stack: Stack, client: AsyncClient) -> None:
    await client.wait_ready(5)
    model = await client.get_model()
    assert (model.name, model.max_context_tokens) == ("tiny", 4096)
    assert (model.max_media_items, model.max_media_bytes) == (3, 100_000)
    assert model.vocab_size == stack.config.text.vocab_size
    assert model.max_request_media_bytes == 150_000
    assert (model.max_text_bytes, model.max_prompt_logits_bytes) == (5_000, 200_000)
