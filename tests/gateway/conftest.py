"""A gateway with one decoder and one encoder behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from gateway.harness import FakeDecoder, FakeEncoder, Stack, running
from prometheus_client import REGISTRY

from chiasm.client import AsyncClient
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


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(stack.address, timeout_s=20.0) as opened:
        yield opened


@pytest.fixture(autouse=True)
async def ledger() -> AsyncIterator[None]:
    """Whatever a test does, the ledger balances in the end."""

    def open_calls() -> float:
        finished = _sum("chiasm_requests_finished_total") + _sum("chiasm_requests_failed_total")
        return _sum("chiasm_requests_accepted_total") - finished

    before = open_calls()
    yield
    for _ in range(200):
        if open_calls() == before and _sum("chiasm_requests_in_flight") == before:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"{open_calls() - before} calls are neither finished nor failed")


def _sum(sample: str) -> float:
    return sum(s.value for metric in REGISTRY.collect() for s in metric.samples if s.name == sample)
