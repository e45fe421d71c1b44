"""Members and topologies on the wire, and back."""

from __future__ import annotations

from chiasm import errors
from chiasm.membership import MemberInfo, MemberState, Role, ShardSet, Topology
from chiasm.transport.enums import MODALITIES, WIRE_MODALITIES
from chiasm.v1 import control_pb2

MAX_SHARDS = 1024
"""Most shards a pool may be cut into."""

_MAX_NAME_CHARS = 256

_ROLES = {
    control_pb2.ROLE_GATEWAY: Role.GATEWAY,
    control_pb2.ROLE_VISION_ENCODER: Role.VISION_ENCODER,
    control_pb2.ROLE_DECODER: Role.DECODER,
    control_pb2.ROLE_EXPERT_POOL: Role.EXPERT_POOL,
}
_STATES = {
    control_pb2.MEMBER_STATE_LOADING: MemberState.LOADING,
    control_pb2.MEMBER_STATE_READY: MemberState.READY,
    control_pb2.MEMBER_STATE_DRAINING: MemberState.DRAINING,
}
_WIRE_ROLES = {role: wire for wire, role in _ROLES.items()}
_WIRE_STATES = {state: wire for wire, state in _STATES.items()}


def member_to_proto(member: MemberInfo) -> control_pb2.MemberReport:
    """A member as it reports itself."""
    return control_pb2.MemberReport(
        member_id=member.member_id,
        role=_WIRE_ROLES[member.role],
        address=member.address,
        metrics_address=member.metrics_address,
        state=_WIRE_STATES[member.state],
        shard_sets=[
            control_pb2.ShardSet(
                modality=WIRE_MODALITIES[held.modality],
                num_shards=held.num_shards,
                shards=held.shards,
                max_shards=held.max_shards,
                weights=held.weights,
            )
            for held in member.shard_sets
        ],
        leaving=member.leaving,
    )


def member_from_proto(wire: control_pb2.MemberReport) -> MemberInfo:
    """The member a report describes. Raises InvalidArgument that names the wrong field."""
    for field in ("member_id", "address"):
        if not getattr(wire, field):
            raise errors.InvalidArgument(field, "must not be empty")
    for field in ("member_id", "address", "metrics_address"):
        if len(getattr(wire, field)) > _MAX_NAME_CHARS:
            raise errors.InvalidArgument(field, f"longer than {_MAX_NAME_CHARS} characters")
    if wire.role not in _ROLES:
        raise errors.InvalidArgument("role", f"unknown role {wire.role}")
    if wire.state not in _STATES:
        raise errors.InvalidArgument("state", f"unknown state {wire.state}")
    shard_sets = tuple(_shard_set(held, i) for i, held in enumerate(wire.shard_sets))
    if len({held.modality for held in shard_sets}) < len(shard_sets):
        raise errors.InvalidArgument("shard_sets", "names a modality twice")
    return MemberInfo(
        member_id=wire.member_id,
        role=_ROLES[wire.role],
        address=wire.address,
        metrics_address=wire.metrics_address,
        state=_STATES[wire.state],
        shard_sets=shard_sets,
        leaving=wire.leaving,
    )


def topology_to_proto(topology: Topology) -> control_pb2.Topology:
    """A topology as watchers get it."""
    return control_pb2.Topology(
        instance_id=topology.instance_id,
        version=topology.version,
        settling=topology.settling,
        members=[member_to_proto(member) for member in topology.members],
    )


def topology_from_proto(wire: control_pb2.Topology) -> Topology:
    """The topology; members of a kind this build does not know are left out."""
    members = []
    for member in wire.members:
        try:
            members.append(member_from_proto(member))
        except errors.InvalidArgument:
            continue
    return Topology(
        instance_id=wire.instance_id,
        version=wire.version,
        settling=wire.settling,
        members=tuple(members),
    )


def _shard_set(wire: control_pb2.ShardSet, index: int) -> ShardSet:
    path = f"shard_sets[{index}]"
    if wire.modality not in MODALITIES:
        raise errors.InvalidArgument(f"{path}.modality", f"unknown modality {wire.modality}")
    if len(wire.weights) > _MAX_NAME_CHARS:
        raise errors.InvalidArgument(f"{path}.weights", f"longer than {_MAX_NAME_CHARS} characters")
    if not 1 <= wire.num_shards <= MAX_SHARDS:
        raise errors.InvalidArgument(f"{path}.num_shards", f"must lie in 1..{MAX_SHARDS}")
    shards = tuple(wire.shards)
    if shards != tuple(sorted(set(shards))) or (shards and shards[-1] >= wire.num_shards):
        raise errors.InvalidArgument(
            f"{path}.shards", f"must ascend and lie in 0..{wire.num_shards - 1}"
        )
    return ShardSet(
        modality=MODALITIES[wire.modality],
        num_shards=wire.num_shards,
        shards=shards,
        max_shards=min(wire.max_shards, wire.num_shards),
        weights=wire.weights,
    )
