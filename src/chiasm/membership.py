"""Who is in the system and what each member holds: plain values, without grpc or torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from chiasm.types import Modality


class Role(StrEnum):
    """What a member is."""

    GATEWAY = "gateway"
    VISION_ENCODER = "vision-encoder"
    DECODER = "decoder"
    EXPERT_POOL = "expert-pool"


class MemberState(StrEnum):
    """How far a member is."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSet:
    """Loaded shards, ascending, of a pool cut into `num_shards`.

    max_shards: most shards the orchestrator may assign; 0: they are fixed. weights: a name of the
    pool's weights, the same for servers that may stand for each other.
    """

    modality: Modality
    num_shards: int
    shards: tuple[int, ...]
    max_shards: int = 0
    weights: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether this is the entire pool."""
        return len(self.shards) == self.num_shards


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberInfo:
    """One process of the system.

    `member_id` is unique for one life of the process. `shard_sets` is set for expert pools, and for
    decoders that run the pools inside. `leaving`: the process is to stop, and takes work until
    others hold its shards.
    """

    member_id: str
    role: Role
    address: str
    metrics_address: str = ""
    state: MemberState = MemberState.LOADING
    shard_sets: tuple[ShardSet, ...] = ()
    leaving: bool = False

    @property
    def is_ready(self) -> bool:
        return self.state is MemberState.READY

    def shard_set(self, modality: Modality) -> ShardSet | None:
        """What the member holds of a pool, if anything."""
        return next((s for s in self.shard_sets if s.modality is modality), None)


@dataclass(frozen=True, slots=True)
class ServingPool:
    """Expert servers that can stand for each other: they cut the pool alike, with the same weights.

    holders: by shard, those that have it loaded and take work; a shard without any is not there.
    """

    num_shards: int = 0
    weights: str = ""
    servers: list[MemberInfo] = field(default_factory=list)
    holders: dict[int, list[MemberInfo]] = field(default_factory=dict)

    def add(self, member: MemberInfo, shards: tuple[int, ...]) -> None:
        """Counts a server in."""
        self.servers.append(member)
        for shard in shards if member.is_ready else ():
            self.holders.setdefault(shard, []).append(member)

    @property
    def is_covered(self) -> bool:
        """Whether every shard has a holder, and there are shards."""
        return 0 < self.num_shards == len(self.holders)

    def rank(self) -> tuple[bool, int, int, str]:
        """The highest one serves: one that has every shard, then the one with most servers."""
        return self.is_covered, len(self.servers), -self.num_shards, self.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """All members at one moment, ordered by member_id.

    `version` grows within one `instance_id`, a life of the orchestrator. While `settling`, members
    that the orchestrator does not know yet are coming back.
    """

    instance_id: str = ""
    version: int = 0
    settling: bool = True
    members: tuple[MemberInfo, ...] = ()

    def ready(self, role: Role) -> tuple[MemberInfo, ...]:
        """Members of a role that take work."""
        return tuple(m for m in self.members if m.role is role and m.is_ready)

    def gateways(self) -> tuple[MemberInfo, ...]:
        """Gateways that take work."""
        return self.ready(Role.GATEWAY)

    def encoders(self) -> tuple[MemberInfo, ...]:
        """Vision encoders that take work."""
        return self.ready(Role.VISION_ENCODER)

    def decoders(self) -> tuple[MemberInfo, ...]:
        """Decoders that take work."""
        return self.ready(Role.DECODER)

    def pool(self, modality: Modality) -> ServingPool:
        """The expert servers that serve a modality, all with the same weights.

        The orchestrator refuses a second cut of a pool, though two may be seen while it settles;
        servers with other weights may come at any time, to take the place of the first.
        """
        pools: dict[tuple[int, str], ServingPool] = {}
        for member in self.members:
            held = member.shard_set(modality) if member.role is Role.EXPERT_POOL else None
            if held is not None:
                kind = held.num_shards, held.weights
                pools.setdefault(kind, ServingPool(*kind)).add(member, held.shards)
        return max(pools.values(), key=ServingPool.rank, default=ServingPool())

    def num_shards(self, modality: Modality) -> int:
        """Into how many shards the expert servers cut a pool; 0 while none is known."""
        return self.pool(modality).num_shards

    def holders(self, modality: Modality, shard: int) -> tuple[MemberInfo, ...]:
        """Expert servers that take work for a shard."""
        return tuple(self.pool(modality).holders.get(shard, ()))

    def missing(self, modality: Modality) -> tuple[int, ...]:
        """Shards of a pool, as far as its cut is known, without a ready expert server."""
        pool = self.pool(modality)
        return tuple(shard for shard in range(pool.num_shards) if shard not in pool.holders)

    def covered(self, modality: Modality) -> bool:
        """Whether every shard of a pool has a ready expert server."""
        return self.pool(modality).is_covered

    def is_complete(self) -> bool:
        """Whether every kind of request can be served.

        Needs a gateway, an encoder, a decoder and both pools; a decoder that runs a pool inside
        stands for that pool.
        """
        return bool(self.gateways() and self.encoders() and self.decoders()) and all(
            self.covered(modality) or self._inside(modality) for modality in Modality
        )

    def merged(self, update: Topology) -> Topology:
        """What a watcher that holds this topology holds after `update`.

        A settling orchestrator does not know every member yet, so its word adds and updates members
        but removes none.
        """
        if not update.settling:
            return update
        members = {m.member_id: m for m in (*self.members, *update.members)}
        return replace(update, members=tuple(members[i] for i in sorted(members)))

    def _inside(self, modality: Modality) -> bool:
        return any(
            held.is_whole for d in self.decoders() if (held := d.shard_set(modality)) is not None
        )
