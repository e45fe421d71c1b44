"""Before a server goes its shards are loaded elsewhere, so that nobody waits for them."""

from __future__ import annotations

import contextlib

import structlog

from chiasm import errors
from chiasm.membership import MemberInfo, MemberState, Role, ShardSet, Topology
from chiasm.model.experts import ExpertBank
from chiasm.transport.service import ServiceProcess

GRACE_SHARE = 0.8
"""Part of the grace period for handing over; the rest is for answering what is in hand."""

log = structlog.get_logger()


async def hand_over(process: ServiceProcess, bank: ExpertBank, *, timeout_s: float) -> None:
    """Asks the orchestrator for heirs and serves on until they have every shard.

    Returns at once where the shards are fixed and where no other server may be assigned any, as
    when a whole pool is stopped; and after the time at the latest.
    """
    member, held = process.member, process.member.report.shard_set(bank.modality)
    if held is None or not held.max_shards:
        return

    def is_over(topology: Topology, ours: ShardSet = held) -> bool:
        others = (m for m in topology.members if m.member_id != member.report.member_id)
        return not bank.shards or not any(_may_inherit(other, ours) for other in others)

    if is_over(process.topology.current):
        return
    log.info("handing_over", shards=bank.shards, timeout_s=timeout_s)
    member.update(leaving=True)
    with contextlib.suppress(errors.Unavailable):
        await process.topology.wait_for(is_over, timeout_s=timeout_s, what="an heir")
    if bank.shards:
        log.warning("not_handed_over", shards=bank.shards)


def _may_inherit(member: MemberInfo, ours: ShardSet) -> bool:
    """Whether a member may be assigned shards of our pool, with our weights, and stays."""
    held = member.shard_set(ours.modality) if member.role is Role.EXPERT_POOL else None
    is_staying = not member.leaving and member.state is not MemberState.DRAINING
    return is_staying and held is not None and held.weights == ours.weights and held.max_shards > 0
