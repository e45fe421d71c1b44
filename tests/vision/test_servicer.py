"""The servicer around the engine: readiness, drain, spans and metrics. In process, without grpc."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, BinaryIO
from unittest.mock import AsyncMock

import pytest
import torch
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY

from chiasm import errors
from chiasm.model.patches import RawPatches
from chiasm.model.processing import PixelSettings
from chiasm.services.vision_encoder.domain import Plan
from chiasm.services.vision_encoder.engine import EncoderEngine
from chiasm.services.vision_encoder.servicer import VisionEncoderServicer
from chiasm.services.vision_encoder.upload import Uploads
from chiasm.telemetry import traces
from chiasm.types import Grid, MediaKind
from chiasm.v1 import common_pb2, encoder_pb2

NUM_ROWS, NUM_COLUMNS = 3000, 130
GRID = Grid(1, 100, 120)
CONTEXT: Any = AsyncMock()
SETTINGS = PixelSettings(
    min_pixels=1, max_pixels=10, rescale_factor=1 / 255, mean=(0, 0, 0), std=(1, 1, 1)
)


class SmallModel:
    """Rows that tell their place, behind a gate."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def plan(self, file: BinaryIO, kind: MediaKind) -> Plan:
        return Plan(GRID, is_exact=True)

    def embedding_bytes(self, grid: Grid) -> int:
        return NUM_ROWS * NUM_COLUMNS * 4

    def preprocess(
        self, file: BinaryIO, kind: MediaKind, on_frame: Callable[[], None]
    ) -> RawPatches:
        levels = torch.zeros(GRID.num_patches, 3, 1, dtype=torch.uint8)
        return RawPatches(levels=levels, grid=GRID, settings=SETTINGS)

    def embed(self, patches: RawPatches) -> torch.Tensor:
        assert self.gate.wait(10)
        return torch.arange(NUM_ROWS)[:, None].repeat(1, NUM_COLUMNS).float()


def uploads() -> Uploads:
    return Uploads(max_media_bytes=100, max_upload_bytes=100, max_memory_bytes=50)


@pytest.fixture
def model() -> SmallModel:
    return SmallModel()


@pytest.fixture
async def servicer(model: SmallModel) -> AsyncIterator[VisionEncoderServicer]:
    servicer = VisionEncoderServicer(uploads())
    servicer.engine = EncoderEngine(model, cache_bytes=1 << 22, max_queue_patches=1 << 20)
    servicer.engine.start()
    yield servicer
    model.gate.set()
    await servicer.close()


async def upload(data: bytes) -> AsyncIterator[encoder_pb2.EncodeRequest]:
    header = encoder_pb2.EncodeHeader(
        digest=hashlib.sha256(b"image\0" + data).hexdigest(),
        kind=common_pb2.MEDIA_KIND_IMAGE,
        size_bytes=len(data),
    )
    yield encoder_pb2.EncodeRequest(header=header)
    yield encoder_pb2.EncodeRequest(chunk=data)


async def test_fetch_streams_every_row_in_order(servicer: VisionEncoderServicer) -> None:
    result = await servicer.Encode(upload(b"x"), CONTEXT)
    request = encoder_pb2.FetchRequest(digest=result.digest)
    chunks = [chunk async for chunk in servicer.Fetch(request, CONTEXT)]
    assert len(chunks) == 2
    rows = b"".join(chunk.rows.data for chunk in chunks)
    first_column = torch.frombuffer(bytearray(rows), dtype=torch.float32).view(NUM_ROWS, -1)[:, 0]
    assert torch.equal(first_column, torch.arange(NUM_ROWS).float())
    assert [c.row_offset for c in chunks] == [0, chunks[0].rows.shape[0]]
    assert {c.total_rows for c in chunks} == {NUM_ROWS}


async def test_unavailable_while_loading() -> None:
    servicer = VisionEncoderServicer(uploads())
    with pytest.raises(errors.Unavailable) as caught:
        await servicer.Encode(upload(b"x"), CONTEXT)
    assert caught.value.retry_after_s is not None
    await servicer.drain()
    await servicer.close()


async def test_drain_finishes_what_is_under_way(
    servicer: VisionEncoderServicer, model: SmallModel
) -> None:
    model.gate.clear()
    running = asyncio.create_task(servicer.Encode(upload(b"x"), CONTEXT))
    engine = servicer.engine
    assert engine is not None
    async with asyncio.timeout(10):
        while not engine.load().queued_items:  # noqa: ASYNC110  # filled by a thread's answer
            await asyncio.sleep(0.001)
    draining = asyncio.create_task(servicer.drain())
    await asyncio.sleep(0)
    with pytest.raises(errors.Unavailable) as caught:
        await servicer.Encode(upload(b"y"), CONTEXT)
    assert caught.value.reason == "DRAINING"
    assert not draining.done()
    model.gate.set()
    assert (await running).num_tokens == NUM_ROWS
    await asyncio.wait_for(draining, 10)


async def test_full_queue_refuses_before_the_file_has_come(model: SmallModel) -> None:
    servicer = VisionEncoderServicer(uploads())
    engine = servicer.engine = EncoderEngine(model, cache_bytes=1 << 22, max_queue_patches=1)
    engine.start()
    model.gate.clear()
    running = asyncio.create_task(servicer.Encode(upload(b"x"), CONTEXT))
    async with asyncio.timeout(10):
        while not engine.load().queued_items:  # noqa: ASYNC110  # filled by a thread's answer
            await asyncio.sleep(0.001)
    second = upload(b"y")
    with pytest.raises(errors.ResourceExhausted) as caught:
        await servicer.Encode(second, CONTEXT)
    assert caught.value.retry_after_s is not None
    assert (await anext(second)).chunk == b"y", "nobody has taken it"
    model.gate.set()
    assert (await running).num_tokens == NUM_ROWS
    await servicer.close()


async def test_spans_of_the_threads_belong_to_the_call(
    servicer: VisionEncoderServicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(traces, "tracer", provider.get_tracer("test"))
    await servicer.Encode(upload(b"x"), CONTEXT)
    await servicer.Encode(upload(b"x"), CONTEXT)
    preprocess, vit, encode, again = exporter.get_finished_spans()
    assert [s.name for s in (preprocess, vit, encode, again)] == [
        "preprocess",
        "vit",
        "encode image",
        "encode image",
    ]
    for span in (preprocess, vit):
        assert span.parent is not None
        assert span.parent.span_id == encode.context.span_id
        assert span.context.trace_id == encode.context.trace_id
    expected = {"chiasm.media.patches": GRID.num_patches, "chiasm.media.cached": False}
    assert encode.attributes is not None
    assert again.attributes is not None
    assert expected.items() <= dict(encode.attributes).items()
    assert again.attributes["chiasm.media.cached"] is True


async def test_metrics_count_the_work(servicer: VisionEncoderServicer) -> None:
    names = {
        "chiasm_encoder_patches_total": {"kind": "image"},
        "chiasm_encoder_compute_seconds_count": {"kind": "image"},
        "chiasm_encoder_cache_hits_total": {},
        "chiasm_encoder_cache_misses_total": {},
    }
    before = {n: REGISTRY.get_sample_value(n, labels) or 0 for n, labels in names.items()}
    for _ in range(3):
        await servicer.Encode(upload(b"x"), CONTEXT)
    after = {n: REGISTRY.get_sample_value(n, labels) or 0 for n, labels in names.items()}
    assert [after[n] - before[n] for n in names] == [GRID.num_patches, 1, 2, 1]
    assert REGISTRY.get_sample_value("chiasm_encoder_queued_patches") == 0
    assert REGISTRY.get_sample_value("chiasm_encoder_cache_bytes") == NUM_ROWS * NUM_COLUMNS * 4
