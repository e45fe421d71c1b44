"""Runs dispatches one after the other on a compute thread and loads shards on another. No grpc."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import structlog
import torch

from chiasm import errors
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.experts import ExpertBank

T = TypeVar("T")
log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed(Generic[T]):
    """A value and where its time went."""

    value: T
    queue_ns: int
    compute_ns: int


class ExpertEngine:
    """One bank, one compute thread, one loader thread."""

    def __init__(
        self, bank: ExpertBank, *, model: Path, config: ModelConfig, max_queued: int
    ) -> None:
        self.bank = bank
        self.epoch = 0
        self.loading: tuple[int, ...] = ()
        self.queued = 0
        self._model, self._config, self._max_queued = model, config, max_queued
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="experts")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self, work: Callable[[], T], *, timeout_ns: int) -> Timed[T]:
        """Queues `work` for the compute thread.

        Raises ResourceExhausted when the queue is full and DeadlineExceeded when the work's turn
        comes after `timeout_ns`.
        """
        if self.queued >= self._max_queued:
            raise errors.ResourceExhausted("dispatch queue is full", retry_after_s=0.05)
        self.queued += 1
        self._idle.clear()
        received = time.monotonic_ns()
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._compute, self._timed, work, received, timeout_ns
            )
        finally:
            self.queued -= 1
            if not self.queued:
                self._idle.set()

    async def assign(
        self,
        shards: Sequence[int],
        *,
        epoch: int,
        on_layer: Callable[[], None] | None = None,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        """Loads the missing shards, then drops the surplus ones; serving goes on meanwhile.

        A newer assignment that arrives meanwhile takes over after the shard being read.
        """
        self.epoch = epoch
        loop = asyncio.get_running_loop()
        missing = [s for s in sorted(set(shards)) if s not in self.bank.shards]
        self.loading = tuple(missing)
        for shard in missing:
            if self.epoch != epoch:
                return
            if shard in self.bank.shards:
                continue
            await loop.run_in_executor(self._loader, self._load, shard, on_layer)
            self.loading = tuple(s for s in self.loading if s != shard)
            if on_change is not None:
                on_change()
        if self.epoch != epoch:
            return
        for shard in set(self.bank.shards) - set(shards):
            self.bank.drop(shard)
        if on_change is not None:
            on_change()

    async def wait_idle(self) -> None:
        """Returns when nothing is queued or running."""
        await self._idle.wait()

    def close(self) -> None:
        """Ends the threads after what they are doing."""
        self._compute.shutdown(wait=False, cancel_futures=True)
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _timed(self, work: Callable[[], T], received: int, timeout_ns: int) -> Timed[T]:
        start = time.monotonic_ns()
        if start - received > timeout_ns:
            raise errors.DeadlineExceeded("dispatch waited past its deadline")
        with torch.inference_mode():
            value = work()
        return Timed(value=value, queue_ns=start - received, compute_ns=time.monotonic_ns() - start)

    def _load(self, shard: int, on_layer: Callable[[], None] | None) -> None:
        start = time.monotonic()
        with Checkpoint(self._model, self._config) as checkpoint:
            self.bank.load(checkpoint, shard, on_layer=on_layer)
            log.info(
                "shard_loaded",
                shard=shard,
                modality=self.bank.modality,
                bytes_read=checkpoint.bytes_read,
                seconds=round(time.monotonic() - start, 3),
            )
