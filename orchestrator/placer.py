"""Carries placements out: asks expert servers to hold what they should, one epoch after another."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import structlog

from chiasm import errors
from chiasm.membership import MemberInfo, MemberState, Role, ShardSet, Topology
from chiasm.orchestrator.expert_servers import ExpertServers
from chiasm.orchestrator.placement import Placement, Server, next_assignment, place, uncovered
from chiasm.telemetry import metrics
from chiasm.transport.messages import MAX_EPOCH
from chiasm.types import Modality
from chiasm.v1 import experts_pb2

GATHER_S = 5.0
"""How long the first server of an empty pool waits for the others that are expected: what it loads
before they come would move to them right away."""

REPEAT_S = 30.0
"""An assignment that has not led to its shards for so long is sent again."""

STUCK_S = 2.0
"""A server that has shards and takes no work for so long does not get on: others take its place."""

BARRED_S = 300.0
"""How long a server is not asked again for a shard that it could not load and another can."""

log = structlog.get_logger()

_Kind = tuple[Modality, str]
"""A pool, and the name of its weights: servers with others are placed by themselves."""


@dataclass(slots=True)
class _Sent:
    shards: tuple[int, ...]
    at: float


@dataclass(slots=True)
class _PoolState:
    """What is remembered of a pool's servers with the same weights. sent: what each was told last.
    idle_since: when each stopped to take work though it has shards. barred: until when by server
    and shard."""

    servers: frozenset[str] = frozenset()
    loads: tuple[float, ...] = ()
    balanced_at: float = -math.inf
    first_seen_at: float | None = None
    target: Placement = field(default_factory=dict)
    sent: dict[str, _Sent] = field(default_factory=dict)
    idle_since: dict[str, float] = field(default_factory=dict)
    barred: dict[tuple[str, int], float] = field(default_factory=dict)


class Placer:
    """Places the shards of both pools on the servers that take assignments.

    min_holders: servers every shard should have, where there are enough.
    rebalance_s: how often the loads of the shards are looked at; deaths and newcomers are dealt
        with at once.
    """

    def __init__(
        self,
        servers: ExpertServers,
        *,
        min_holders: int,
        rebalance_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._servers, self._clock = servers, clock
        self._min_holders, self._rebalance_s = min_holders, rebalance_s
        self._pools: dict[_Kind, _PoolState] = {}
        self._epoch = 0

    async def step(
        self,
        topology: Topology,
        loads: Mapping[Modality, tuple[float, ...]],
        *,
        leaving: Collection[str] = (),
        expected: Mapping[Modality, int] | None = None,
    ) -> None:
        """Brings the servers one step nearer to a good placement.

        leaving: member_ids of servers that shall end up with nothing.
        expected: servers there will be, where that is known.
        """
        servers = _servers(topology)
        self._pools = {kind: self._pools.get(kind, _PoolState()) for kind in servers}
        for (modality, weights), pool in self._pools.items():
            members = servers[modality, weights]
            wanted = (expected or {}).get(modality)
            if not self._may_place(pool, members, topology, wanted):
                continue
            self._place(pool, members, leaving, topology.num_shards(modality), loads[modality])
            await self._send(pool, members)

    def can_go(self, member: MemberInfo, topology: Topology) -> bool:
        """Whether nobody needs a leaving server any more: each of its shards is held elsewhere."""
        (held,) = member.shard_sets
        if held.max_shards:
            pool = self._pools.get((held.modality, held.weights), _PoolState())
            sent = pool.sent.get(member.member_id)
            return sent is not None and not sent.shards
        holders = topology.pool(held.modality).holders
        return all(
            any(h.member_id != member.member_id for h in holders.get(shard, ()))
            for shard in held.shards
        )

    def _may_place(
        self,
        pool: _PoolState,
        members: Mapping[str, MemberInfo],
        topology: Topology,
        expected: int | None,
    ) -> bool:
        """Not while servers are on their way back; and an empty pool waits for all it will have."""
        if pool.first_seen_at is None:
            pool.first_seen_at = self._clock()
        is_loaded = any(s.shards for m in members.values() for s in m.shard_sets)
        if is_loaded or any(sent.shards for sent in pool.sent.values()):
            return not topology.settling
        if expected is not None and len(members) >= expected:
            return True
        waited_s = self._clock() - pool.first_seen_at
        return not topology.settling and (expected is None or waited_s >= GATHER_S)

    def _place(
        self,
        pool: _PoolState,
        members: Mapping[str, MemberInfo],
        leaving: Collection[str],
        num_shards: int,
        loads: tuple[float, ...],
    ) -> None:
        """Makes the target: anew when servers have come or gone, or it is time to look at loads."""
        staying = frozenset(members) - frozenset(leaving) - self._stuck(pool, members)
        is_due = self._clock() - pool.balanced_at >= self._rebalance_s
        if staying == pool.servers and not is_due and len(pool.loads) == num_shards:
            return
        pool.servers, pool.balanced_at = staying, self._clock()
        pool.loads = loads if len(loads) == num_shards else (0.0,) * num_shards
        pool.barred = {key: end for key, end in pool.barred.items() if end > self._clock()}
        barred = set(pool.barred)
        servers = _candidates(pool, members, staying, barred)
        placed = dict(place(pool.loads, servers, min_holders=self._min_holders))
        if missing := frozenset(uncovered(num_shards, placed, servers)):
            # What nobody else can take is better tried again where it failed than left out.
            barred = {(name, shard) for name, shard in barred if shard not in missing}
            servers = _candidates(pool, members, staying, barred)
            placed = dict(place(pool.loads, servers, min_holders=self._min_holders))
        placed |= {name: () for name in members if name in leaving}
        if placed != pool.target:
            log.info(
                "placed",
                shards={n: ",".join(map(str, shards)) for n, shards in placed.items()},
                loads=[round(load, 3) for load in pool.loads],
                uncovered=uncovered(num_shards, placed, servers),
            )
        pool.target = placed

    def _stuck(self, pool: _PoolState, members: Mapping[str, MemberInfo]) -> frozenset[str]:
        now = self._clock()
        pool.idle_since = {
            name: pool.idle_since.get(name, now)
            for name, member in members.items()
            if _held(member).shards and not member.is_ready
        }
        return frozenset(name for name, at in pool.idle_since.items() if now - at >= STUCK_S)

    async def _send(self, pool: _PoolState, members: Mapping[str, MemberInfo]) -> None:
        """Tells those servers what to hold that do not know it yet."""
        loaded = {name: frozenset(_held(member).shards) for name, member in members.items()}
        ready = frozenset(name for name, member in members.items() if member.is_ready)
        capacity = {name: _held(member).max_shards for name, member in members.items()}
        assignment = next_assignment(pool.target, loaded, ready, capacity)
        pool.sent = {name: sent for name, sent in pool.sent.items() if name in members}
        news = {
            name: shards
            for name, shards in assignment.items()
            if name in members and self._is_news(pool.sent.get(name), shards, loaded[name])
        }
        if not news:
            return
        for name in news:
            if (sent := pool.sent.get(name)) is not None and self._is_late(sent, loaded[name]):
                await self._bar(pool, members[name], frozenset(sent.shards) - loaded[name])
        self._epoch += 1
        await asyncio.gather(
            *(self._assign(pool, members[name], shards) for name, shards in news.items())
        )
        metrics.PLACEMENT_EPOCH.set(self._epoch)

    def _is_news(self, sent: _Sent | None, shards: tuple[int, ...], loaded: frozenset[int]) -> bool:
        if sent is None:
            return True
        return sent.shards != shards or self._is_late(sent, loaded)

    def _is_late(self, sent: _Sent, loaded: frozenset[int]) -> bool:
        return self._clock() - sent.at >= REPEAT_S and frozenset(sent.shards) != loaded

    async def _bar(self, pool: _PoolState, member: MemberInfo, missing: frozenset[int]) -> None:
        """Has shards placed elsewhere that a server was told to load and does not even try to."""
        described = await self._described(member)
        if described is None:
            return
        for shard in missing - {*described.loaded_shards, *described.loading_shards}:
            log.warning("shard_not_loaded", member=member.member_id, shard=shard)
            pool.barred[member.member_id, shard] = self._clock() + BARRED_S
            pool.balanced_at = -math.inf

    async def _assign(self, pool: _PoolState, member: MemberInfo, shards: tuple[int, ...]) -> None:
        try:
            await self._servers.assign(member.address, shards, self._epoch)
        except errors.FailedPrecondition:
            # Another orchestrator was here before: go on from where it was.
            await self._catch_up(member)
        except errors.ChiasmError as error:
            log.warning("not_assigned", member=member.member_id, error=error.message[:256])
        else:
            log.info("assigned", member=member.member_id, shards=shards, epoch=self._epoch)
            pool.sent[member.member_id] = _Sent(shards, self._clock())

    async def _catch_up(self, member: MemberInfo) -> None:
        described = await self._described(member)
        if described is not None and described.epoch <= MAX_EPOCH:
            self._epoch = max(self._epoch, described.epoch)

    async def _described(self, member: MemberInfo) -> experts_pb2.PoolDescription | None:
        try:
            return await self._servers.describe(member.address)
        except errors.ChiasmError as error:
            log.warning("not_described", member=member.member_id, error=error.message[:256])
            return None


def _servers(topology: Topology) -> dict[_Kind, dict[str, MemberInfo]]:
    """The servers that are not on their way out, by member_id."""
    cuts = {modality: topology.num_shards(modality) for modality in Modality}
    found: dict[_Kind, dict[str, MemberInfo]] = {}
    for member in topology.members:
        is_leaving = member.state is MemberState.DRAINING
        if member.role is Role.EXPERT_POOL and not is_leaving and len(member.shard_sets) == 1:
            held = _held(member)
            if held.num_shards == cuts[held.modality]:
                found.setdefault((held.modality, held.weights), {})[member.member_id] = member
    return found


def _candidates(
    pool: _PoolState,
    members: Mapping[str, MemberInfo],
    staying: Collection[str],
    barred: Collection[tuple[str, int]],
) -> list[Server]:
    """The servers that stay, as placement sees them."""
    found = []
    for name, member in members.items():
        held, unable = _held(member), frozenset(s for other, s in barred if other == name)
        if name in staying and (held.max_shards or held.shards):
            shards = frozenset(pool.target.get(name) or held.shards) - unable
            server = Server(server_id=name, capacity=held.max_shards, held=shards, barred=unable)
            found.append(server)
    return found


def _held(member: MemberInfo) -> ShardSet:
    return member.shard_sets[0]
