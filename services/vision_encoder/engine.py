"""Media items through preprocessing and ViT, each digest once, into the embedding cache. No grpc.

Two threads form a pipeline: while one item is in the ViT, the next is decoded. An item is dropped
before its next stage, and a video between two frames, when everybody who waited for it has gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import BinaryIO, TypeVar

import torch
from opentelemetry import context as otel_context

from chiasm import errors
from chiasm.cache import ByteLRU
from chiasm.kernels.device import is_device_lost
from chiasm.load import EncoderLoad
from chiasm.model.patches import RawPatches
from chiasm.pulse import Pulse
from chiasm.services.vision_encoder.domain import Encoded, MediaModel, Plan
from chiasm.telemetry import metrics, traces
from chiasm.types import Grid, MediaKind

T = TypeVar("T")

MIN_RETRY_S, MAX_RETRY_S = 0.1, 30.0
"""Bounds of the time after which refused callers are told to come back."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Job:
    """An item on its way. `file` is closed as soon as it is decoded."""

    digest: str
    kind: MediaKind
    file: BinaryIO
    num_patches: int
    done: asyncio.Future[Encoded]
    admitted_ns: int = field(default_factory=time.monotonic_ns)
    context: otel_context.Context = field(default_factory=otel_context.get_current)
    num_waiters: int = 0
    is_started: bool = False
    preprocess_ns: int = 0


class EncoderEngine:
    """Use from one event loop only; `start` before anything else."""

    def __init__(self, model: MediaModel, *, cache_bytes: int, max_queue_patches: int) -> None:
        self._model, self._max_queue_patches = model, max_queue_patches
        self._cache: ByteLRU[tuple[Encoded, torch.Tensor]] = ByteLRU(cache_bytes)
        self._jobs: dict[str, _Job] = {}
        self._queued_patches = self._admitted_patches = self._encoded_patches = 0
        self._busy_ns = 0
        self._patches_per_s = 0.0
        self._arrived: asyncio.Queue[_Job] = asyncio.Queue()  # bounded by _admit
        self._prepared: asyncio.Queue[tuple[_Job, RawPatches]] = asyncio.Queue(maxsize=1)
        self.pulse = Pulse()
        self._idle = asyncio.Event()
        self._idle.set()
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="preprocess")
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="vit")
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Starts the pipeline."""
        stages = (self._preprocess_stage(), self._compute_stage())
        self._tasks = [asyncio.create_task(stage) for stage in stages]

    async def find(self, digest: str) -> Encoded | None:
        """The item from the cache, or from the work under way on it; None if there is neither."""
        job = self._jobs.get(digest)
        if job is not None:
            metrics.EMBEDDING_CACHE_HITS.inc()
            return await self._wait(job)
        entry = self._cache.get(digest)
        if entry is None:
            return None
        metrics.EMBEDDING_CACHE_HITS.inc()
        return replace(entry[0], cached=True, queue_ns=0, preprocess_ns=0, compute_ns=0)

    async def encode(self, digest: str, kind: MediaKind, file: BinaryIO) -> Encoded:
        """Encodes a file whose digest has been checked, and closes it.

        Raises InvalidArgument for a file that cannot be decoded or yields more than the cache
        holds, ResourceExhausted when the queue is full.
        """
        job = None
        try:
            plan = await asyncio.to_thread(self._model.plan, file, kind)
            found = await self.find(digest)
            if found is not None:
                return found
            job = self._admit(digest, kind, file, plan)
        finally:
            if job is None:
                file.close()
        return await self._wait(job)

    def check_queue(self) -> None:
        """Raises ResourceExhausted when the queue is full."""
        if self._queued_patches >= self._max_queue_patches:
            raise errors.ResourceExhausted(
                f"{self._queued_patches} patches are queued, limit {self._max_queue_patches}",
                retry_after_s=self._backlog_s(),
            )

    def embeddings(self, digest: str) -> torch.Tensor:
        """Embeddings [tokens, hidden] on the CPU. Raises NotFound when they were evicted."""
        entry = self._cache.get(digest)
        if entry is None:
            raise errors.NotFound(
                f"embeddings of {digest} are not held; encode again",
                reason=errors.EMBEDDING_EVICTED,
            )
        return entry[1]

    def load(self) -> EncoderLoad:
        """How much there is to do, how much was done, what is held."""
        oldest_ns = min((job.admitted_ns for job in self._jobs.values()), default=None)
        return EncoderLoad(
            queued_items=len(self._jobs),
            queued_patches=self._queued_patches,
            admitted_patches_total=self._admitted_patches,
            encoded_patches_total=self._encoded_patches,
            busy_s_total=self._busy_ns / 1e9,
            oldest_wait_s=(time.monotonic_ns() - oldest_ns) / 1e9 if oldest_ns else 0.0,
            cache_bytes=self._cache.num_bytes,
        )

    async def wait_idle(self) -> None:
        """Returns when nothing is queued or running."""
        await self._idle.wait()

    async def close(self) -> None:
        """Ends the pipeline; whoever still waits is cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for job in list(self._jobs.values()):
            self._forget(job)
            job.done.cancel()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._compute.shutdown(wait=False, cancel_futures=True)

    def _admit(self, digest: str, kind: MediaKind, file: BinaryIO, plan: Plan) -> _Job:
        if plan.is_exact:
            self._check_size(kind, plan.grid)
        self.check_queue()
        num_patches = plan.grid.num_patches
        metrics.EMBEDDING_CACHE_MISSES.inc()
        done: asyncio.Future[Encoded] = asyncio.get_running_loop().create_future()
        job = _Job(digest=digest, kind=kind, file=file, num_patches=num_patches, done=done)
        self._jobs[digest] = job
        self._admitted_patches += num_patches
        self._count_queued(num_patches)
        self._arrived.put_nowait(job)
        return job

    def _check_size(self, kind: MediaKind, grid: Grid) -> None:
        """Refuses what the cache cannot hold: nobody could ever fetch it."""
        num_bytes = self._model.embedding_bytes(grid)
        if num_bytes > self._cache.budget_bytes:
            raise errors.InvalidArgument(
                kind, f"yields {num_bytes} bytes of embeddings, limit {self._cache.budget_bytes}"
            )

    async def _wait(self, job: _Job) -> Encoded:
        job.num_waiters += 1
        try:
            return await asyncio.shield(job.done)
        finally:
            job.num_waiters -= 1
            if not job.num_waiters and not job.is_started:
                self._forget(job)

    async def _preprocess_stage(self) -> None:
        while True:
            await self._preprocess(await self._arrived.get())

    async def _compute_stage(self) -> None:
        while True:
            await self._embed(*await self._prepared.get())

    async def _preprocess(self, job: _Job) -> None:
        if not job.num_waiters:
            return  # forgotten by _wait
        job.is_started = True
        try:
            on_frame = partial(self._go_on, job)
            work = partial(self._model.preprocess, job.file, job.kind, on_frame)
            patches, job.preprocess_ns = await self._run(self._readers, job, "preprocess", work)
        except Exception as error:
            self._fail(job, error)
            return
        job.file.close()
        await self._prepared.put((job, patches))

    def _go_on(self, job: _Job) -> None:
        """Asked on the reader's thread: a long video gets on, or nobody wants it any more."""
        self.pulse.beat()
        if not job.num_waiters:
            raise errors.Unavailable("given up, as nobody waited for it")

    async def _embed(self, job: _Job, patches: RawPatches) -> None:
        if not job.num_waiters:
            self._forget(job)
            return
        try:
            self._check_size(job.kind, patches.grid)  # the header may have lied, or not told
            work = partial(self._model.embed, patches)
            embeddings, compute_ns = await self._run(self._compute, job, "vit", work)
        except Exception as error:
            self._fail(job, error)
            return
        self._finish(job, patches.grid, embeddings, compute_ns)

    async def _run(
        self, pool: ThreadPoolExecutor, job: _Job, name: str, work: Callable[[], T]
    ) -> tuple[T, int]:
        """Runs on a thread, which knows the caller's trace context only if it is handed over."""

        def timed() -> tuple[T, int]:
            start = time.monotonic_ns()
            with traces.span(name, context=job.context):
                value = work()
            return value, time.monotonic_ns() - start

        try:
            return await asyncio.get_running_loop().run_in_executor(pool, timed)
        finally:
            self.pulse.beat()

    def _finish(self, job: _Job, grid: Grid, embeddings: torch.Tensor, compute_ns: int) -> None:
        elapsed_ns = time.monotonic_ns() - job.admitted_ns
        encoded = Encoded(
            digest=job.digest,
            grid=grid,
            num_tokens=len(embeddings),
            queue_ns=elapsed_ns - job.preprocess_ns - compute_ns,
            preprocess_ns=job.preprocess_ns,
            compute_ns=compute_ns,
        )
        self._cache.put(job.digest, (encoded, embeddings), embeddings.nbytes)
        self._encoded_patches += grid.num_patches
        self._busy_ns += max(job.preprocess_ns, compute_ns)
        rate = grid.num_patches / max(compute_ns, 1) * 1e9
        self._patches_per_s = rate if not self._patches_per_s else (self._patches_per_s + rate) / 2
        self._observe(job.kind, encoded)
        self._forget(job)
        if not job.done.done():
            job.done.set_result(encoded)

    def _fail(self, job: _Job, error: Exception) -> None:
        if is_device_lost(error):
            self.pulse.end()
        self._forget(job)
        if not job.done.done():
            job.done.set_exception(error)
            job.done.exception()  # nobody may be left to fetch it

    def _forget(self, job: _Job) -> None:
        """Takes an item off the books, once."""
        if self._jobs.get(job.digest) is job:
            del self._jobs[job.digest]
            job.file.close()
            self._count_queued(-job.num_patches)

    def _count_queued(self, num_patches: int) -> None:
        self._queued_patches += num_patches
        metrics.QUEUED_PATCHES.set(self._queued_patches)
        if self._jobs:
            self._idle.clear()
            self.pulse.begin()
        else:
            self._idle.set()
            self.pulse.rest()

    def _backlog_s(self) -> float:
        """Time the queue takes at the pace of late; a second while the pace is not known."""
        pace = self._patches_per_s
        return min(max(self._queued_patches / pace, MIN_RETRY_S), MAX_RETRY_S) if pace else 1.0

    def _observe(self, kind: MediaKind, encoded: Encoded) -> None:
        metrics.ENCODED_PATCHES.labels(kind).inc(encoded.grid.num_patches)
        metrics.ENCODER_QUEUE_SECONDS.labels(kind).observe(encoded.queue_ns / 1e9)
        metrics.ENCODER_PREPROCESS_SECONDS.labels(kind).observe(encoded.preprocess_ns / 1e9)
        metrics.ENCODER_COMPUTE_SECONDS.labels(kind).observe(encoded.compute_ns / 1e9)
        metrics.EMBEDDING_CACHE_BYTES.set(self._cache.num_bytes)
