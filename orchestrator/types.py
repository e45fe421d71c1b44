"""What placement, scaling and their backends speak of: plain values, and the seam between them.

A `Backend` is whatever runs the replicas. The Kubernetes adapter (kubernetes.py) implements it by
the scale subresource of the pools' StatefulSets: the desired replicas live there, so an
orchestrator that starts anew, or takes over as leader, finds them. The local backend (launcher.py)
implements it by orders to the `chiasm up` process that owns the children. With `scaling=external`
somebody else, KEDA or an HPA, sets the counts from the same `Decision`; placement stays ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from chiasm.load import Load
from chiasm.membership import MemberInfo, Role, Topology
from chiasm.types import Modality


class Pool(StrEnum):
    """What is scaled: members that can stand in for each other. Gateways are not ours to scale."""

    ENCODER = "encoder"
    DECODER = "decoder"
    TEXT_EXPERTS = "text-experts"
    VISION_EXPERTS = "vision-experts"

    @property
    def modality(self) -> Modality | None:
        """The expert bank; None for the other pools."""
        return _MODALITIES.get(self)


_MODALITIES = {Pool.TEXT_EXPERTS: Modality.TEXT, Pool.VISION_EXPERTS: Modality.VISION}

EXPERT_POOLS: Mapping[Modality, Pool] = {m: pool for pool, m in _MODALITIES.items()}


def pool_of(member: MemberInfo) -> Pool | None:
    """The pool a member is a replica of; None for gateways and for members that say too little."""
    match member.role:
        case Role.VISION_ENCODER:
            return Pool.ENCODER
        case Role.DECODER:
            return Pool.DECODER
        case Role.EXPERT_POOL if len(member.shard_sets) == 1:
            return EXPERT_POOLS[member.shard_sets[0].modality]
        case _:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """A member's last word on its load; `at` is when it came, in seconds of the loop's clock."""

    at: float
    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """All that one decision is made from, as it stood at one moment.

    replicas: desired replicas of the pools that the backend scales, as the backend has them.
    loads: by member_id; members that have not reported a load are absent.
    """

    at: float
    topology: Topology
    replicas: Mapping[Pool, int]
    loads: Mapping[str, LoadReport]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """How one pool is scaled. Times are seconds.

    min_replicas, max_replicas: bounds of the decision. A minimum of 0 lets the pool go to zero.
    up, down: shares of the replicas' capacity. Above `up` replicas are added, below `down` one is
        taken away, provided that the others then stay below `up`.
    target_s: what must not take longer. Encoder and vision experts: working off what is queued;
        text experts: a dispatch's mean wait for the compute thread; decoder: a step.
    up_tau_s: time constant of the smoothing on the way up.
    down_window_s: on the way down the busiest moment of this window counts.
    up_dwell_s, down_dwell_s: least time from one change of the pool to the next one up, or down.
    max_step: replicas that may be added at once; doubling always may.
    warm_up_s: reports of a member that has been ready for a shorter time do not count.
    stale_s: a report older than this is no report.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    up: float = 0.8
    down: float = 0.4
    target_s: float = 2.0
    up_tau_s: float = 5.0
    down_window_s: float = 300.0
    up_dwell_s: float = 10.0
    down_dwell_s: float = 60.0
    max_step: int = 4
    warm_up_s: float = 10.0
    stale_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Desired replicas of each pool, and why; a pool that is held keeps the number it has. before:
    the replicas there were."""

    at: float
    before: Mapping[Pool, int] = field(default_factory=dict)
    replicas: Mapping[Pool, int] = field(default_factory=dict)
    reasons: Mapping[Pool, str] = field(default_factory=dict)


class Backend(Protocol):
    """What starts and stops replicas. Every call is bounded in time.

    A scale-in goes: `retire` names the member, its shards are loaded elsewhere, the member is
    drained, `scale` lowers the number by one. `scale` up needs nothing before it.
    """

    async def replicas(self) -> Mapping[Pool, int]:
        """Desired replicas of the pools it can scale. Raises Unavailable; the loop holds then."""

    async def scale(self, pool: Pool, replicas: int) -> None:
        """Sets the desired replicas, and returns without waiting for them.

        Raises Unavailable, NotFound for a pool it cannot scale, FailedPrecondition when somebody
        else has changed the number since `replicas` was asked, or when this process must not act
        any more. The loop decides anew then.
        """

    async def retire(self, pool: Pool, ranked: Sequence[MemberInfo]) -> MemberInfo | None:
        """Which of these members goes when the pool is scaled by one less than it has now.

        `ranked` are all the pool's members, the one that is missed least first. A backend that can
        choose takes the first, and stops exactly that one on the next `scale`; one that cannot, as
        StatefulSets which remove the highest ordinal, says which it will be. None: a replica that
        is no member, as one that never came.
        """

    async def close(self) -> None:
        """Lets go of what the backend holds; replicas go on."""
