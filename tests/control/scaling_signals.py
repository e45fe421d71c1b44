"""Members, their loads and signals for tests of scaling."""

from __future__ import annotations

from collections.abc import Mapping

from chiasm.load import DecoderLoad, EncoderLoad, ExpertLoad, GatewayLoad, Load
from chiasm.membership import MemberInfo, MemberState, Role, ShardSet, Topology
from chiasm.orchestrator.types import LoadReport, Pool, PoolConfig, Signals
from chiasm.types import Modality

CONFIG = PoolConfig(
    max_replicas=8,
    up_tau_s=0.001,  # no smoothing, unless a test is about it
    down_window_s=60,
    up_dwell_s=10,
    down_dwell_s=20,
    warm_up_s=10,
    stale_s=10,
)


def member(
    role: Role, name: str, modality: Modality | None = None, **changes: object
) -> MemberInfo:
    held: tuple[ShardSet, ...] = ()
    if modality is not None:
        held = (ShardSet(modality=modality, num_shards=2, shards=(0, 1), max_shards=2),)
    fields = {"state": MemberState.READY, "shard_sets": held, **changes}
    return MemberInfo(member_id=name, role=role, address=f"{name}:1", **fields)  # type: ignore[arg-type]


GATEWAY = member(Role.GATEWAY, "gateway")
ENCODER = member(Role.VISION_ENCODER, "encoder")
DECODER = member(Role.DECODER, "decoder")
TEXT_SERVER = member(Role.EXPERT_POOL, "text", Modality.TEXT)
VISION_SERVER = member(Role.EXPERT_POOL, "vision", Modality.VISION)
ALL = (GATEWAY, ENCODER, DECODER, TEXT_SERVER, VISION_SERVER)

REPLICAS = dict.fromkeys(Pool, 1)


def signals(
    at: float,
    loads: Mapping[str, Load],
    members: tuple[MemberInfo, ...] = ALL,
    replicas: Mapping[Pool, int] = REPLICAS,
    *,
    reported_at: float | None = None,
) -> Signals:
    return Signals(
        at=at,
        topology=Topology(instance_id="i", settling=False, members=members),
        replicas=replicas,
        loads={
            name: LoadReport(at=at if reported_at is None else reported_at, load=load)
            for name, load in loads.items()
        },
    )


IDLE: dict[str, Load] = {
    "gateway": GatewayLoad(),
    "encoder": EncoderLoad(),
    "decoder": DecoderLoad(kv_tokens_capacity=1000),
    "text": ExpertLoad(),
    "vision": ExpertLoad(),
}
