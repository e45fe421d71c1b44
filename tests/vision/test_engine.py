"""The encoder's engine over a model that waits for the test."""

from __future__ import annotations

import asyncio
import io
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import BinaryIO

import pytest
import torch
from waiting import until

from chiasm import errors
from chiasm.model.patches import RawPatches
from chiasm.model.processing import PixelSettings
from chiasm.services.vision_encoder.domain import Encoded, Plan
from chiasm.services.vision_encoder.engine import EncoderEngine
from chiasm.types import Grid, MediaKind

IMAGE = MediaKind.IMAGE
GRID = Grid(1, 4, 6)
TOKENS = 6
ITEM_BYTES = TOKENS * 8 * 4
WAIT_S = 10
STALL_S = 0.05
SETTINGS = PixelSettings(
    min_pixels=1, max_pixels=10, rescale_factor=1 / 255, mean=(0, 0, 0), std=(1, 1, 1)
)


class FakeModel:
    """Every file has the same grid, and `planned` is what its header tells; b"bad" cannot be
    decoded, b"defect" fails in the ViT, b"lost" with the device.

    `decoding` and `gate` hold the two stages back while they are clear. While `is_long` there is
    always one more frame.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.decoding = threading.Event()
        self.decoding.set()
        self.is_long, self.num_frames = False, 0
        self.planned = Plan(GRID, is_exact=True)
        self.embedded: list[bytes] = []
        self.preprocessed: list[bytes] = []
        self.levels: dict[int, bytes] = {}
        self.files: list[BinaryIO] = []

    def plan(self, file: BinaryIO, kind: MediaKind) -> Plan:
        assert not file.closed
        self.files.append(file)
        return self.planned

    def embedding_bytes(self, grid: Grid) -> int:
        return ITEM_BYTES * grid.num_patches // GRID.num_patches

    def preprocess(
        self, file: BinaryIO, kind: MediaKind, on_frame: Callable[[], None]
    ) -> RawPatches:
        assert self.decoding.wait(WAIT_S)
        while self.is_long:
            time.sleep(0.001)
            on_frame()
            self.num_frames += 1
        file.seek(0)
        data = file.read()
        self.preprocessed.append(data)
        if data == b"bad":
            raise errors.InvalidArgument(kind, "cannot be decoded")
        patches = RawPatches(levels=torch.zeros(24, 3, 196).byte(), grid=GRID, settings=SETTINGS)
        self.levels[id(patches)] = data
        return patches

    def embed(self, patches: RawPatches) -> torch.Tensor:
        assert self.gate.wait(WAIT_S)
        data = self.levels.pop(id(patches))
        if data == b"defect":
            raise RuntimeError("defect")
        if data == b"lost":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        self.embedded.append(data)
        return torch.full((TOKENS, 8), float(data[0]))


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
async def engine(model: FakeModel) -> AsyncIterator[EncoderEngine]:
    engine = EncoderEngine(model, cache_bytes=3 * ITEM_BYTES, max_queue_patches=4 * 24)
    engine.start()
    yield engine
    model.decoding.set()
    model.gate.set()
    await engine.close()
    assert all(file.closed for file in model.files)


def encode(engine: EncoderEngine, name: bytes) -> Awaitable[Encoded]:
    return engine.encode(name.decode(), IMAGE, io.BytesIO(name))


def begin(engine: EncoderEngine, name: bytes) -> asyncio.Task[Encoded]:
    return asyncio.ensure_future(encode(engine, name))


async def until_queued(engine: EncoderEngine, num_items: int) -> None:
    await until(lambda: engine.load().queued_items == num_items)


async def until_waited_for(engine: EncoderEngine, name: bytes, num_waiters: int) -> None:
    """Callers of one item look at its header on threads of their own before they join it."""

    def is_so() -> bool:
        job = engine._jobs.get(name.decode())
        return job is not None and job.num_waiters == num_waiters

    await until(is_so)


async def test_encodes_then_answers_from_the_cache(engine: EncoderEngine, model: FakeModel) -> None:
    first = await encode(engine, b"a")
    assert (first.grid, first.num_tokens, first.cached) == (GRID, TOKENS, False)
    again = await engine.find("a")
    assert again is not None
    assert again.cached
    assert (again.queue_ns, again.preprocess_ns, again.compute_ns) == (0, 0, 0)
    assert await engine.find("b") is None
    assert torch.equal(engine.embeddings("a"), torch.full((TOKENS, 8), float(ord("a"))))
    assert model.embedded == [b"a"]
    load = engine.load()
    assert (load.queued_items, load.encoded_patches_total, load.cache_bytes) == (0, 24, ITEM_BYTES)


async def test_same_digest_is_computed_once(engine: EncoderEngine, model: FakeModel) -> None:
    model.gate.clear()
    tasks = [begin(engine, b"a") for _ in range(5)]
    await until_queued(engine, 1)
    joined = asyncio.create_task(engine.find("a"))
    await asyncio.sleep(0)
    model.gate.set()
    results = await asyncio.gather(*tasks, joined)
    assert model.embedded == [b"a"]
    assert {r.digest for r in results if r} == {"a"}


async def test_eviction_is_told_by_reason(engine: EncoderEngine) -> None:
    for name in (b"a", b"b", b"c", b"d"):
        await encode(engine, name)
    with pytest.raises(errors.NotFound) as caught:
        engine.embeddings("a")
    assert caught.value.reason == "EMBEDDING_EVICTED"
    assert engine.load().cache_bytes == 3 * ITEM_BYTES


async def test_full_queue_refuses_and_recovers(engine: EncoderEngine, model: FakeModel) -> None:
    model.gate.clear()
    tasks = [begin(engine, name) for name in (b"a", b"b", b"c", b"d")]
    await until_queued(engine, 4)
    assert engine.load().queued_patches == 4 * 24
    with pytest.raises(errors.ResourceExhausted) as caught:
        await encode(engine, b"e")
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0
    model.gate.set()
    await asyncio.gather(*tasks)
    assert engine.load().queued_patches == 0
    assert not (await encode(engine, b"e")).cached


async def test_last_item_may_go_beyond_the_queue(model: FakeModel) -> None:
    engine = EncoderEngine(model, cache_bytes=2 * ITEM_BYTES, max_queue_patches=25)
    engine.start()
    model.gate.clear()
    tasks = [begin(engine, name) for name in (b"a", b"b")]
    await until_queued(engine, 2)
    with pytest.raises(errors.ResourceExhausted):
        await encode(engine, b"c")
    model.gate.set()
    assert [(await task).num_tokens for task in tasks] == [TOKENS, TOKENS]
    await engine.close()


async def test_item_whose_header_tells_no_length_is_judged_by_what_it_has(
    engine: EncoderEngine, model: FakeModel
) -> None:
    model.planned = Plan(GRID._replace(t=180), is_exact=False)
    assert (await encode(engine, b"a")).num_tokens == TOKENS
    assert engine.load().queued_patches == 0


async def test_item_larger_than_the_cache_is_refused(model: FakeModel) -> None:
    engine = EncoderEngine(model, cache_bytes=ITEM_BYTES - 1, max_queue_patches=100)
    engine.start()
    with pytest.raises(errors.InvalidArgument) as caught:
        await encode(engine, b"a")
    assert caught.value.field == "image"
    assert not model.preprocessed
    await engine.close()


@pytest.mark.parametrize(
    ("name", "error"), [(b"bad", errors.InvalidArgument), (b"defect", RuntimeError)]
)
async def test_failure_reaches_its_own_waiters_alone(
    engine: EncoderEngine, model: FakeModel, name: bytes, error: type[Exception]
) -> None:
    model.decoding.clear()
    tasks = [begin(engine, n) for n in (b"a", name, name, b"b")]
    await until_queued(engine, 3)
    model.decoding.set()
    good, bad, bad_too, good_too = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(bad, error)
    assert isinstance(bad_too, error)
    assert sorted(model.embedded) == [b"a", b"b"]
    assert not isinstance(good, BaseException)
    assert not isinstance(good_too, BaseException)
    await engine.wait_idle()


async def test_abandoned_item_is_dropped_before_it_starts(
    engine: EncoderEngine, model: FakeModel
) -> None:
    """a is in the ViT, b prepared, c blocks the preprocessing stage: d has not started."""
    model.gate.clear()
    tasks = {}
    for i, name in enumerate((b"a", b"b", b"c")):
        tasks[name] = begin(engine, name)
        await until(lambda i=i: len(model.preprocessed) == i + 1)
    waiters = [begin(engine, b"d"), begin(engine, b"d")]
    await until_waited_for(engine, b"d", 2)

    waiters[0].cancel()
    await asyncio.wait({waiters[0]})
    assert engine.load().queued_items == 4, "one waiter is left"
    waiters[1].cancel()
    await asyncio.wait({waiters[1]})
    assert (engine.load().queued_items, engine.load().queued_patches) == (3, 72)

    tasks[b"b"].cancel()  # prepared already: dropped before the ViT
    model.gate.set()
    await asyncio.gather(tasks[b"a"], tasks[b"c"])
    await engine.wait_idle()
    assert model.embedded == [b"a", b"c"]
    assert model.preprocessed == [b"a", b"b", b"c"]
    assert not (await encode(engine, b"d")).cached


async def test_a_long_video_gets_on_and_is_given_up_when_nobody_waits(
    engine: EncoderEngine, model: FakeModel
) -> None:
    model.is_long = True
    waiters = [begin(engine, b"a"), begin(engine, b"a")]
    await until_waited_for(engine, b"a", 2)
    next_one = begin(engine, b"b")
    await until_waited_for(engine, b"b", 1)
    await until(lambda: model.num_frames > 2)
    before = model.num_frames
    await asyncio.sleep(2 * STALL_S)
    await until(lambda: engine.pulse.stalled_s() < STALL_S)  # the clock starts anew
    waiters[0].cancel()
    await until(lambda: model.num_frames > before + 5)
    assert engine.load().queued_items == 2, "one waiter is left"
    waiters[1].cancel()
    await until(lambda: engine.load().queued_items == 1)
    model.is_long = False
    assert not (await next_one).cached
    assert model.embedded == [b"b"]


@pytest.mark.parametrize("stage", ["decoding", "gate"])
async def test_an_item_that_does_not_get_on_stalls_the_engine(
    engine: EncoderEngine, model: FakeModel, stage: str
) -> None:
    assert engine.pulse.stalled_s() == 0
    held: threading.Event = getattr(model, stage)
    held.clear()
    task = begin(engine, b"a")
    await until(lambda: engine.pulse.stalled_s() > STALL_S)
    others = [begin(engine, name) for name in (b"b", b"c")]
    await until_queued(engine, 3)
    await until(lambda: engine.pulse.stalled_s() > STALL_S)
    held.set()
    await asyncio.gather(task, *others)
    assert engine.pulse.stalled_s() == 0


async def test_an_encoder_whose_device_is_lost_is_not_alive_any_more(engine: EncoderEngine) -> None:
    with pytest.raises(torch.AcceleratorError):
        await encode(engine, b"lost")
    assert engine.pulse.stalled_s() == math.inf


async def test_close_frees_those_who_wait(model: FakeModel) -> None:
    engine = EncoderEngine(model, cache_bytes=ITEM_BYTES, max_queue_patches=100)
    engine.start()
    model.gate.clear()
    tasks = [begin(engine, name) for name in (b"a", b"b")]
    await until_queued(engine, 2)
    model.gate.set()
    await engine.close()
    await asyncio.wait(tasks, timeout=WAIT_S)
    assert all(task.done() for task in tasks)
