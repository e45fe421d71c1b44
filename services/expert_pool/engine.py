"""A bank of experts, the thread that computes with it and the one that loads it. No grpc."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.experts import ExpertBank
from chiasm.services.expert_pool.worker import Worker

log = structlog.get_logger()


class ExpertEngine:
    """One bank, one compute thread, one loader thread."""

    def __init__(
        self,
        bank: ExpertBank,
        *,
        model: Path,
        config: ModelConfig,
        max_queued: int,
        verify: bool = False,
    ) -> None:
        self.bank = bank
        self.epoch = 0
        self.loading: tuple[int, ...] = ()
        self.max_queued = max_queued
        self.worker = Worker("experts")
        self._model, self._config, self._verify = model, config, verify
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")

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

    async def settled(self) -> None:
        """Returns when everything that is queued now has been done."""
        done, loop = asyncio.Event(), asyncio.get_running_loop()
        self.worker.submit(lambda: _tell(loop, done))
        await done.wait()

    def close(self) -> None:
        """Ends the threads after what they are doing."""
        self.worker.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _load(self, shard: int, on_layer: Callable[[], None] | None) -> None:
        start = time.monotonic()
        with Checkpoint(self._model, self._config, verify=self._verify) as checkpoint:
            self.bank.load(checkpoint, shard, on_layer=on_layer)
            log.info(
                "shard_loaded",
                shard=shard,
                modality=self.bank.modality,
                bytes_read=checkpoint.bytes_read,
                seconds=round(time.monotonic() - start, 3),
            )


def _tell(loop: asyncio.AbstractEventLoop, done: asyncio.Event) -> None:
    """Sets the event from another thread; a loop that has ended waits for nothing."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(done.set)
