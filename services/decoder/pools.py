"""The expert pools as the engine sees them: begin a dispatch, wait for its partials.

A remote pool (remote.py) sends dispatches to expert servers; a local pool runs the same code in
this process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from chiasm.model.experts import ExpertBank
from chiasm.model.moe import Dispatch, Partial, PendingPartials
from chiasm.services.decoder.dispatches import PoolFailed, PoolUnavailable
from chiasm.telemetry import metrics
from chiasm.types import Modality

__all__ = ["ExpertPools", "LocalPool", "Pool", "PoolFailed", "PoolUnavailable"]


class Answer(Protocol):
    """A dispatch under way."""

    def result(self, timeout_s: float, /) -> list[Partial]:
        """Every shard's partial. Raises PoolUnavailable, PoolFailed, or TimeoutError when the time
        is up."""
        ...


class Pool(Protocol):
    """One modality's experts."""

    @property
    def is_covered(self) -> bool:
        """True when every shard can be computed now."""
        ...

    def begin(self, dispatch: Dispatch) -> Answer: ...

    def tidy(self) -> None:
        """Sees to what has arrived; called now and then while nothing is asked of the pool."""
        ...


class ExpertPools:
    """Both pools; an Experts for the model. Called from the engine's thread only.

    `wait_ns` sums, per modality, the time the engine stood waiting for answers.
    """

    def __init__(self, pools: dict[Modality, Pool], *, timeout_s: float) -> None:
        self._pools = pools
        self._timeout_s = timeout_s
        self.wait_ns = dict.fromkeys(Modality, 0)

    def covered(self) -> frozenset[Modality]:
        """The pools that can answer now."""
        return frozenset(m for m, pool in self._pools.items() if pool.is_covered)

    def tidy(self) -> None:
        """Lets the pools see to what has arrived while nothing is asked of them."""
        for pool in self._pools.values():
            pool.tidy()

    def begin(self, dispatch: Dispatch) -> PendingPartials:
        return _Pending(dispatch.modality, self._pools[dispatch.modality].begin(dispatch), self)

    def wait(self, modality: Modality, answer: Answer) -> list[Partial]:
        """Waits for one answer, bounded, and books the time."""
        start = time.monotonic_ns()
        try:
            return answer.result(self._timeout_s)
        except TimeoutError:
            raise PoolUnavailable(modality, f"the {modality} pool did not answer") from None
        finally:
            waited = time.monotonic_ns() - start
            self.wait_ns[modality] += waited
            metrics.EXPERT_WAIT_SECONDS.labels(modality).observe(waited / 1e9)


@dataclass(frozen=True, slots=True)
class _Pending:
    modality: Modality
    answer: Answer
    pools: ExpertPools

    def result(self) -> Sequence[Partial]:
        return self.pools.wait(self.modality, self.answer)


class LocalPool:
    """A pool inside this process: every shard, one compute thread."""

    def __init__(self, bank: ExpertBank) -> None:
        self._bank = bank
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"{bank.modality}-experts")
        self.is_covered = True

    def begin(self, dispatch: Dispatch) -> Future[list[Partial]]:
        return self._thread.submit(self._run, dispatch)

    def tidy(self) -> None:
        """Nothing arrives."""

    def _run(self, dispatch: Dispatch) -> list[Partial]:
        try:
            with torch.inference_mode():
                return self._bank.answer(dispatch)
        except Exception as error:
            raise PoolFailed(self._bank.modality) from error
