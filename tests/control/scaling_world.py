"""Members, expert servers and a backend in memory, around a real loop, on a clock of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from chiasm import errors
from chiasm.load import DecoderLoad, EncoderLoad, ExpertLoad, Load
from chiasm.membership import MemberInfo, MemberState, Role, ShardSet
from chiasm.orchestrator.expert_servers import ExpertServers
from chiasm.orchestrator.loop import ScalingLoop
from chiasm.orchestrator.members import Membership
from chiasm.orchestrator.placer import Placer
from chiasm.orchestrator.planner import Planner
from chiasm.orchestrator.types import Pool, PoolConfig
from chiasm.types import Modality
from chiasm.v1 import experts_pb2

NUM_SHARDS = 4
LEASE_S = 6.0
CONFIG = PoolConfig(
    max_replicas=4,
    up_tau_s=0.01,
    down_window_s=20,
    up_dwell_s=4,
    down_dwell_s=4,
    warm_up_s=0,
    stale_s=10,
)
TEXT, VISION = Pool.TEXT_EXPERTS, Pool.VISION_EXPERTS


@dataclass
class Process:
    """A member in memory. An expert server loads one shard after the other, each in `load_steps`;
    one that it cannot load it tries again when it is told again."""

    info: MemberInfo
    load: Load
    told: tuple[int, ...] = ()
    epoch: int = 0
    queued: int = 0
    dropped: list[int] = field(default_factory=list)
    drained_until: float | None = None
    broken: set[int] = field(default_factory=set)  # shards it cannot load
    load_steps: int = 1
    is_stuck: bool = False  # keeps what it has and takes no work

    def __post_init__(self) -> None:
        self.max_shards = self.held.max_shards if self.info.shard_sets else 0
        self._failed: set[int] = set()
        self._reading: tuple[int, int] = (-1, 0)  # a shard, and for how many steps

    @property
    def is_draining(self) -> bool:
        return self.drained_until is not None

    @property
    def held(self) -> ShardSet:
        return self.info.shard_sets[0]

    @property
    def missing(self) -> list[int]:
        """Shards it is loading."""
        return sorted({*self.told} - {*self.held.shards} - self._failed)

    def tell(self, shards: Collection[int], epoch: int) -> None:
        self.told, self.epoch = tuple(sorted(shards)), epoch
        self._failed.clear()

    def work(self) -> None:
        if self.is_stuck:
            self.info = replace(self.info, state=MemberState.LOADING)
        if not self.max_shards or self.is_stuck:
            return
        have = set(self.held.shards)
        self.dropped += sorted(have - set(self.told))
        have &= set(self.told)
        have |= set(self._loaded())
        assert len(have) <= self.max_shards, "there is no room for so many"
        shards = () if self.is_draining else tuple(sorted(have))
        state = MemberState.READY if shards else MemberState.LOADING
        held = replace(
            self.held, shards=shards, max_shards=0 if self.is_draining else self.max_shards
        )
        self.info = replace(self.info, shard_sets=(held,), state=state)

    def _loaded(self) -> Iterable[int]:
        """What this step has loaded."""
        for shard in self.missing[:1]:
            last, steps = self._reading
            self._reading = shard, steps + 1 if shard == last else 1
            if self._reading[1] < self.load_steps:
                return
            self._reading = -1, 0
            if shard not in self.broken:
                yield shard
            else:
                self._failed.add(shard)


class World(ExpertServers):
    """Processes by address; also the backend that starts and stops them, and the clock."""

    def __init__(self, configs: Mapping[Pool, PoolConfig], *, scales: bool = True) -> None:
        super().__init__()
        self.now = 100.0
        self.processes: dict[str, Process] = {}
        self.wanted: dict[Pool, int] = {}
        self.is_away = self.is_stuck = False  # answers nothing; does not scale
        self.is_full = False  # has no room for another process
        self.scaled: list[tuple[Pool, int]] = []
        self.unreachable: set[str] = set()
        self._count = 0
        self._leaving: dict[Pool, str] = {}
        self._configs, self._scales = configs, scales
        self.start_orchestrator()

    def start_orchestrator(self) -> None:
        """A new life of the orchestrator, which knows nothing."""
        self.membership = Membership(
            instance_id="i", lease_s=LEASE_S, max_members=100, now=self.now
        )
        self.loop = ScalingLoop(
            self.membership,
            planner=Planner(self._configs),
            placer=Placer(self, min_holders=1, rebalance_s=60.0, clock=lambda: self.now),
            servers=self,
            backend=self if self._scales else None,
            applies=True,
            interval_s=2.0,
            clock=lambda: self.now,
        )

    # The expert servers.

    async def assign(
        self, address: str, shards: Collection[int], epoch: int
    ) -> experts_pb2.PoolDescription:
        process = self._reach(address)
        if epoch < process.epoch:
            raise errors.FailedPrecondition("old", reason="STALE_EPOCH")
        process.tell(shards, epoch)
        return await self.describe(address)

    async def drain(self, address: str, lease_s: float) -> experts_pb2.PoolDescription:
        self._reach(address).drained_until = self.now + lease_s
        return await self.describe(address)

    async def describe(self, address: str) -> experts_pb2.PoolDescription:
        process = self._reach(address)
        return experts_pb2.PoolDescription(
            epoch=process.epoch,
            queued_dispatches=process.queued,
            loaded_shards=process.held.shards,
            loading_shards=process.missing,
        )

    async def keep(self, addresses: Collection[str]) -> None: ...

    def _reach(self, address: str) -> Process:
        if address not in self.processes or address in self.unreachable:
            raise errors.Unavailable("gone")
        return self.processes[address]

    # The backend.

    async def replicas(self) -> Mapping[Pool, int]:
        if self.is_away:
            raise errors.Unavailable("away")
        return dict(self.wanted)

    async def scale(self, pool: Pool, replicas: int) -> None:
        if self.is_stuck:
            raise errors.Unavailable("stuck")
        self.scaled.append((pool, replicas))
        self.wanted[pool] = replicas
        self.follow(pool)

    async def retire(self, pool: Pool, ranked: Sequence[MemberInfo]) -> MemberInfo | None:
        if len(ranked) < self.wanted[pool]:
            return None
        self._leaving[pool] = ranked[0].address
        return ranked[0]

    def follow(self, pool: Pool) -> None:
        """Starts and stops processes as wanted."""
        there = [a for a in self.processes if a.startswith(pool)]
        for _ in range(0 if self.is_full else self.wanted[pool] - len(there)):
            self.start(pool)
        for address in self._going(pool, there)[: max(0, len(there) - self.wanted[pool])]:
            self.kill(address)

    def _going(self, pool: Pool, there: list[str]) -> list[str]:
        leaving = self._leaving.pop(pool, "")
        return sorted(there, key=lambda address: address != leaving)

    # The processes.

    def start(
        self,
        pool: Pool,
        *,
        max_shards: int = NUM_SHARDS,
        shards: Sequence[int] = (),
        weights: str = "",
    ) -> str:
        """One more process; `shards` without max_shards are fixed ones."""
        self._count += 1
        address = f"{pool}-{self._count}"
        self.processes[address] = Process(
            info=server_info(pool, address, max_shards, tuple(shards), weights), load=_IDLE[pool]
        )
        return address

    def kill(self, address: str) -> None:
        self.membership.end(address, session=1, now=self.now)
        del self.processes[address]

    def add(self, role: Role, load: Load) -> None:
        """A member that nobody scales."""
        info = MemberInfo(member_id=role, role=role, address=role, state=MemberState.READY)
        self.processes[role] = Process(info=info, load=load)

    async def step(self, count: int = 1) -> None:
        """Two seconds each: everybody works and reports, and the loop goes round."""
        for _ in range(count):
            self.now += 2.0
            for process in self.processes.values():
                if process.is_draining and process.drained_until < self.now:
                    process.drained_until = None
                process.work()
                self.membership.report(process.info, session=1, now=self.now, load=process.load)
            self.membership.expire(self.now)
            await self.loop.decide()
            await self.loop.place()
            await self.loop.retire()

    def shards(self, modality: Modality = Modality.TEXT) -> dict[str, tuple[int, ...]]:
        """What each server of a pool has loaded."""
        return {
            address: p.held.shards
            for address, p in self.processes.items()
            if p.info.role is Role.EXPERT_POOL and p.held.modality is modality
        }

    @property
    def is_covered(self) -> bool:
        return {s for shards in self.shards().values() for s in shards} == set(range(NUM_SHARDS))


_IDLE: Mapping[Pool, Load] = {
    Pool.ENCODER: EncoderLoad(),
    Pool.DECODER: DecoderLoad(kv_tokens_capacity=1000),
    TEXT: ExpertLoad(),
    VISION: ExpertLoad(),
}


def server_info(
    pool: Pool, address: str, max_shards: int, shards: tuple[int, ...], weights: str = ""
) -> MemberInfo:
    role = Role.EXPERT_POOL
    held: tuple[ShardSet, ...] = ()
    if pool.modality is None:
        role = Role.DECODER if pool is Pool.DECODER else Role.VISION_ENCODER
    else:
        held = (
            ShardSet(
                modality=pool.modality,
                num_shards=NUM_SHARDS,
                shards=shards,
                max_shards=max_shards,
                weights=weights,
            ),
        )
    is_ready = pool.modality is None or bool(shards)
    return MemberInfo(
        member_id=address,
        role=role,
        address=address,
        state=MemberState.READY if is_ready else MemberState.LOADING,
        shard_sets=held,
    )


def world(*, min_text: int = 1, **counts: int) -> World:
    """Pools by name with the replicas they begin with; `vision_experts=1`."""
    made = World(
        {pool: replace(CONFIG, min_replicas=min_text if pool is TEXT else 0) for pool in Pool}
    )
    for name, count in counts.items():
        pool = Pool(name.replace("_", "-"))
        made.wanted[pool] = count
        made.follow(pool)
    return made
