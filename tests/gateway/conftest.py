"""A gateway with one decoder and one encoder behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from gateway.harness import FakeDecoder, FakeEncoder, Stack, running

from chiasm.transport.channel import open_channel
from chiasm.v1 import inference_pb2_grpc


@pytest.fixture
async def stack(tiny_checkpoint: Path) -> AsyncIterator[Stack]:
    """Tight limits, so that tests of them stay small."""
    async with running(
        tiny_checkpoint,
        max_media_items=3,
        max_media_bytes=100_000,
        max_request_media_bytes=150_000,
        max_text_bytes=5_000,
        max_prompt_logits_bytes=200_000,
        park_timeout_s=0.5,
    ) as started:
        yield started


@pytest.fixture
async def decoder(stack: Stack) -> FakeDecoder:
    return await stack.add_decoder()


@pytest.fixture
async def encoder(stack: Stack) -> FakeEncoder:
    return await stack.add_encoder()


@pytest.fixture
async def channel(stack: Stack) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(stack.address, max_message_bytes=16 << 20) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> inference_pb2_grpc.InferenceStub:
    return inference_pb2_grpc.InferenceStub(channel)
