"""A bank of experts, the thread that computes with it and the one that loads it. No grpc."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.experts import ExpertBank
from chiasm.pulse import Pulse
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
        verify: bool = False,
    ) -> None:
        self.bank = bank
        self.epoch = 0
        self.loading: tuple[int, ...] = ()
        self.worker = Worker("experts")
        self.loader_pulse = Pulse()
        self._wanted: frozenset[int] = frozenset()
        self._num_assignments = 0
        self._reading = asyncio.Lock()
        self._model, self._config = model, config
        self._verified: set[Path] | None = set() if verify else None
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")

    def may_assign(self, shards: Iterable[int], epoch: int) -> bool:
        """Whether an assignment is newer than the last one, or says the same again."""
        if not self._num_assignments:
            return True
        return epoch > self.epoch or (epoch == self.epoch and frozenset(shards) == self._wanted)

    def assign(
        self,
        shards: Sequence[int],
        *,
        epoch: int,
        on_layer: Callable[[], None] | None = None,
        on_change: Callable[[], None] | None = None,
    ) -> Coroutine[None, None, None]:
        """Drops the surplus shards, which may have the room that the others need; what it returns
        loads the missing ones, while serving goes on. The assignment counts from the call on.

        A later assignment takes over after the shard being read, which is dropped again before the
        next one is read where it is not wanted any more. A shard that cannot be loaded keeps none
        of the others from it; what was wrong with the first is raised in the end.
        """
        self.epoch = epoch
        self._num_assignments += 1
        number, self._wanted = self._num_assignments, frozenset(shards)
        on_change = on_change or (lambda: None)
        self._drop_unwanted()
        self.loading = tuple(s for s in sorted(set(shards)) if s not in self.bank.shards)
        on_change()
        return self._load_missing(number, on_layer, on_change)

    async def _load_missing(
        self, number: int, on_layer: Callable[[], None] | None, on_change: Callable[[], None]
    ) -> None:
        failures, loop = [], asyncio.get_running_loop()
        for shard in self.loading:
            try:
                async with self._reading:
                    self._drop_unwanted()
                    if shard in self._wanted - {*self.bank.shards}:
                        await loop.run_in_executor(self._loader, self._load, shard, on_layer)
            except Exception as error:
                log.error("shard_not_loaded", shard=shard, error=str(error)[:256])
                failures.append(error)
            if self._num_assignments != number:
                return
            self.loading = tuple(s for s in self.loading if s != shard)
            on_change()
        async with self._reading:  # what an earlier assignment was reading is there now
            self._drop_unwanted()
        if self._num_assignments != number:
            return
        on_change()
        if failures:
            raise failures[0]

    def stalled_s(self) -> float:
        """Seconds since either thread has got on with what it has to do."""
        return max(self.worker.pulse.stalled_s(), self.loader_pulse.stalled_s())

    async def settled(self) -> None:
        """Returns when everything that is queued now has been done."""
        done, loop = asyncio.Event(), asyncio.get_running_loop()
        self.worker.submit(lambda: _tell(loop, done))
        await done.wait()

    def close(self) -> None:
        """Ends the threads after what they are doing."""
        self.worker.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _drop_unwanted(self) -> None:
        for shard in {*self.bank.shards} - self._wanted:
            self.bank.drop(shard)

    def _load(self, shard: int, on_layer: Callable[[], None] | None) -> None:
        def beat() -> None:
            self.loader_pulse.beat()
            if on_layer is not None:
                on_layer()

        self.loader_pulse.begin()
        try:
            self._read(shard, beat)
        finally:
            self.loader_pulse.rest()

    def _read(self, shard: int, on_layer: Callable[[], None]) -> None:
        start = time.monotonic()
        with Checkpoint(self._model, self._config, verified=self._verified) as checkpoint:
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
