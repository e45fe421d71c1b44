"""The loops: signals -> decision -> replicas, and shards to servers. Never on the token path."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Mapping

import structlog

from chiasm import errors
from chiasm.membership import Topology
from chiasm.orchestrator.expert_servers import ExpertServers
from chiasm.orchestrator.journal import Journal
from chiasm.orchestrator.members import Membership
from chiasm.orchestrator.placer import Placer
from chiasm.orchestrator.planner import Planner
from chiasm.orchestrator.retirement import Retirements
from chiasm.orchestrator.types import EXPERT_POOLS, Backend, Decision, Pool, Signals
from chiasm.telemetry import metrics
from chiasm.types import Modality

MIN_PAUSE_S = 0.05
"""Least time from one change of the topology to the next that is looked at."""

log = structlog.get_logger()


class ScalingLoop:
    """Decides every `interval_s`, and places shards then and after every change of the topology.

    backend: None where nobody scales; shards are placed all the same.
    applies: whether decisions are carried out by the backend; otherwise somebody else does it, and
        `decision` is for him to read.
    may_act: asked before every step, and before anything is scaled.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        planner: Planner,
        placer: Placer,
        servers: ExpertServers,
        backend: Backend | None,
        applies: bool,
        interval_s: float,
        may_act: Callable[[], bool] = lambda: True,
        journal: Journal | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.decision: Decision | None = None
        self._membership, self._planner, self._placer = membership, planner, placer
        self._servers, self._backend, self._applies = servers, backend, applies
        self._interval_s, self._may_act, self._journal = interval_s, may_act, journal
        self._clock = clock
        self._retirements = (
            Retirements(backend, servers, placer, clock=clock)
            if backend is not None and applies
            else None
        )
        self._replicas: Mapping[Pool, int] = {}
        self._is_away = False
        self._decided_at = float("-inf")

    async def run(self, changed: Callable[[Topology], Awaitable[None]]) -> None:
        """Runs until cancelled. `changed` returns when the topology is another than the given.

        Shards are placed beside the decisions: a backend that hangs holds up no placement.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._rounds(changed, self._scale, self._undecided_s))
            tasks.create_task(self._rounds(changed, self.place, lambda: 0.0))

    async def _rounds(
        self,
        changed: Callable[[Topology], Awaitable[None]],
        step: Callable[[], Awaitable[None]],
        spent_s: Callable[[], float],
    ) -> None:
        """A step every `interval_s`, of which some are spent when it has ended, and after every
        change."""
        while True:
            seen = self._membership.topology
            if self._may_act():
                try:
                    await step()
                except Exception:
                    # One bad step must not end all that follow.
                    log.exception("step_failed")
            with contextlib.suppress(TimeoutError):
                await asyncio.sleep(MIN_PAUSE_S)
                async with asyncio.timeout(max(MIN_PAUSE_S, self._interval_s - spent_s())):
                    await changed(seen)

    def _undecided_s(self) -> float:
        return self._clock() - self._decided_at

    async def _scale(self) -> None:
        if self._undecided_s() >= self._interval_s:
            self._decided_at = self._clock()
            await self.decide()
        await self.retire()

    async def decide(self) -> None:
        """One decision, carried out as far as it can be at once."""
        replicas = await self._known_replicas()
        if replicas is None:
            # Without the backend's word nothing is decided, and nothing is forgotten.
            return
        self._replicas = replicas
        signals = Signals(
            at=self._clock(),
            topology=self._membership.topology,
            replicas=self._replicas,
            loads=dict(self._membership.loads),
        )
        before, self.decision = self.decision, self._planner.step(signals)
        self._tell(before, self.decision)
        if self._journal is not None and replicas:
            try:
                self._journal.add(signals, self.decision)
            except OSError as error:
                log.error("journal_failed", error=str(error))
                self._journal = None
        if self._retirements is not None:
            for pool, wanted in self.decision.replicas.items():
                if not self._may_act():  # the backend may have taken its time
                    return
                try:
                    await self._apply(pool, wanted, signals)
                except errors.ChiasmError as error:
                    log.warning("not_scaled", pool=pool, error=error.message[:256])

    async def place(self) -> None:
        """One step of placement."""
        topology, observation = self._membership.topology, self._planner.observation
        loads: Mapping[Modality, tuple[float, ...]] = dict.fromkeys(Modality, ())
        if observation is not None:
            loads = observation.shard_loads
        await self._placer.step(
            topology,
            loads,
            leaving=self._leaving(topology),
            expected={m: self._replicas[p] for m, p in EXPERT_POOLS.items() if p in self._replicas},
        )
        await self._servers.keep({member.address for member in topology.members})

    async def retire(self) -> None:
        """One step of retirements."""
        if self._retirements is None or not self._may_act():
            return
        try:
            await self._retirements.step(self._membership.topology, self._replicas)
        except errors.ChiasmError as error:
            log.warning("not_retired", error=error.message[:256])

    def _leaving(self, topology: Topology) -> Collection[str]:
        """member_ids of those that shall end up with no shards: by their own word, or retired."""
        leaving = {member.member_id for member in topology.members if member.leaving}
        return leaving.union(self._retirements.members() if self._retirements is not None else ())

    async def close(self) -> None:
        """Closes connections and the backend."""
        await self._servers.close()
        if self._backend is not None:
            await self._backend.close()

    async def _known_replicas(self) -> Mapping[Pool, int] | None:
        """The backend's replicas; none without a backend, None while it does not answer."""
        if self._backend is None:
            return {}
        try:
            replicas = await self._backend.replicas()
        except errors.ChiasmError as error:
            if not self._is_away:
                log.warning("backend_away", error=error.message[:256])
            self._is_away = True
            return None
        self._is_away = False
        return replicas

    async def _apply(self, pool: Pool, wanted: int, signals: Signals) -> None:
        assert self._backend is not None
        assert self._retirements is not None
        have = signals.replicas[pool]
        if wanted >= have:
            # A member that has been drained goes first; the next decision makes up for it.
            if self._retirements.cancel(pool) and wanted > have:
                await self._backend.scale(pool, wanted)
        elif wanted == 0:
            # Nobody has wanted it for long. Whoever comes in this moment is parked, and wakes it.
            self._retirements.forget(pool)
            await self._backend.scale(pool, 0)
        else:
            await self._retirements.begin(pool, signals)

    def _tell(self, before: Decision | None, decision: Decision) -> None:
        observation = self._planner.observation
        assert observation is not None
        for pool, wanted in decision.replicas.items():
            view = observation.pools[pool]
            metrics.REPLICAS_WANTED.labels(pool).set(wanted)
            if view.demand is not None:
                metrics.REPLICAS_DEMANDED.labels(pool).set(view.demand.replicas)
            elif before is not None:
                with contextlib.suppress(KeyError):
                    metrics.REPLICAS_DEMANDED.remove(pool)
            if wanted != view.replicas and (before is None or before.replicas.get(pool) != wanted):
                log.info(
                    "scaling",
                    pool=pool,
                    replicas=wanted,
                    before=view.replicas,
                    reason=decision.reasons[pool],
                )
