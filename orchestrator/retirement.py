"""Taking one replica of a pool away without anybody noticing.

The backend names the member; its shards are loaded elsewhere; an expert server is told to refuse
new dispatches, and left alone until it has answered those it has; only then the backend stops it.
Encoders and decoders do the like themselves on SIGTERM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import structlog

from chiasm import errors
from chiasm.load import DecoderLoad, EncoderLoad
from chiasm.membership import MemberInfo, Topology
from chiasm.orchestrator.expert_servers import ExpertServers
from chiasm.orchestrator.placer import Placer
from chiasm.orchestrator.types import Backend, Pool, Signals, pool_of

MOVE_TIMEOUT_S = 600.0
"""How long the shards of a member that is to go may take to be loaded elsewhere."""

DRAIN_TIMEOUT_S = 30.0
"""How long a drained server may take to answer what it has."""

DRAIN_LEASE_S = 60.0
"""After so long a drained server that was forgotten, by a new orchestrator, takes work again."""

log = structlog.get_logger()


@dataclass(slots=True)
class _Leaving:
    member: MemberInfo
    replicas: int  # once it has gone
    since: float
    drained_at: float | None = None
    is_stopped: bool = False


class Retirements:
    """At most one for each pool at a time."""

    def __init__(
        self,
        backend: Backend,
        servers: ExpertServers,
        placer: Placer,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend, self._servers, self._placer = backend, servers, placer
        self._clock = clock
        self._leaving: dict[Pool, _Leaving] = {}

    def members(self) -> Collection[str]:
        """member_ids of those that shall end up with no shards."""
        return [leaving.member.member_id for leaving in self._leaving.values()]

    async def begin(self, pool: Pool, signals: Signals) -> None:
        """Chooses a member and begins to take it out, unless one is under way."""
        if pool in self._leaving:
            return
        members, left = ranked(pool, signals), signals.replicas[pool] - 1
        member = await self._backend.retire(pool, members)
        if member is not None:
            log.info("retiring", pool=pool, member=member.member_id)
            self._leaving[pool] = _Leaving(member, left, self._clock())
        elif len(members) <= left:
            await self._backend.scale(pool, left)  # it never came, and holds nothing
        else:
            log.warning("nobody_to_retire", pool=pool)

    def cancel(self, pool: Pool) -> bool:
        """Keeps the member after all; False when it is drained, which cannot be taken back."""
        leaving = self._leaving.get(pool)
        if leaving is None or leaving.is_stopped:
            return True
        if leaving.drained_at is not None:
            return False
        log.info("not_retiring", pool=pool, member=leaving.member.member_id)
        del self._leaving[pool]
        return True

    def forget(self, pool: Pool) -> None:
        """Ends the retirement: the pool goes as a whole."""
        self._leaving.pop(pool, None)

    async def step(self, topology: Topology, replicas: Mapping[Pool, int]) -> None:
        """Brings every retirement one step further. Raises what the backend raises.

        replicas: as the backend had them last; if somebody else has changed them, the case is over.
        """
        present = {m.member_id: m for m in topology.members}
        for pool, leaving in tuple(self._leaving.items()):
            member = present.get(leaving.member.member_id)
            if leaving.is_stopped:
                if member is None or self._clock() - leaving.since > MOVE_TIMEOUT_S:
                    del self._leaving[pool]
            elif replicas.get(pool) != leaving.replicas + 1:
                del self._leaving[pool]
            elif member is None or await self._is_idle(pool, leaving, member, topology):
                await self._stop(pool, leaving)
            elif leaving.drained_at is None and self._clock() - leaving.since > MOVE_TIMEOUT_S:
                log.warning("not_retired", pool=pool, member=member.member_id)
                del self._leaving[pool]

    async def _stop(self, pool: Pool, leaving: _Leaving) -> None:
        try:
            await self._backend.scale(pool, leaving.replicas)
        except errors.FailedPrecondition as error:
            log.warning("not_scaled", pool=pool, error=error.message[:256])
            del self._leaving[pool]
        else:
            leaving.is_stopped, leaving.since = True, self._clock()

    async def _is_idle(
        self, pool: Pool, leaving: _Leaving, member: MemberInfo, topology: Topology
    ) -> bool:
        """Whether the member may be stopped; drained it stays once others hold its shards."""
        if pool.modality is None:
            return True
        if leaving.drained_at is None and not self._placer.can_go(member, topology):
            return False
        try:
            described = await self._servers.drain(member.address, DRAIN_LEASE_S)
            if leaving.drained_at is None:
                leaving.drained_at = self._clock()
                log.info("drained", pool=pool, member=member.member_id)
        except errors.ChiasmError as error:
            log.warning("not_drained", member=member.member_id, error=error.message[:256])
            return self._waited_long(leaving)
        return not described.queued_dispatches or self._waited_long(leaving)

    def _waited_long(self, leaving: _Leaving) -> bool:
        return (
            leaving.drained_at is not None and self._clock() - leaving.drained_at > DRAIN_TIMEOUT_S
        )


def ranked(pool: Pool, signals: Signals) -> Sequence[MemberInfo]:
    """The pool's members, the one that is missed least first: not ready, little at work, little
    held."""

    def value(member: MemberInfo) -> tuple[bool, int, int, str]:
        report = signals.loads.get(member.member_id)
        work = held = 0
        match report.load if report is not None else None:
            case DecoderLoad(running_requests=running, waiting_requests=waiting):
                work = running + waiting
            case EncoderLoad(queued_patches=patches, cache_bytes=cached):
                work, held = patches, cached
            case _:
                held = sum(len(s.shards) for s in member.shard_sets)
        return member.is_ready, work, held, member.member_id

    return sorted((m for m in signals.topology.members if pool_of(m) is pool), key=value)
