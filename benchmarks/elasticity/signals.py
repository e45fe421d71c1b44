"""The simulated system as its members would report it."""

from __future__ import annotations

from benchmarks.elasticity.system import KV_TOKENS, MAX_RUNNING, Replica, System
from chiasm.load import DecoderLoad, EncoderLoad, ExpertLoad, GatewayLoad, Load, ShardLoad
from chiasm.membership import MemberInfo, MemberState, Role, ShardSet, Topology
from chiasm.orchestrator.types import LoadReport, Pool, Signals

_GATEWAY = MemberInfo(
    member_id="gateway", role=Role.GATEWAY, address="gateway", state=MemberState.READY
)
_ROLES = {Pool.ENCODER: Role.VISION_ENCODER, Pool.DECODER: Role.DECODER}


class Reports:
    """Keeps what members look like, so that each is made once for each of its states."""

    def __init__(self) -> None:
        self._members: dict[tuple[str, MemberState], MemberInfo] = {}

    def signals(self, system: System) -> Signals:
        """Everything that an orchestrator would know now."""
        members, loads = [_GATEWAY], {"gateway": _gateway(system)}
        for pool, fleet in system.fleets.items():
            ready = fleet.ready(system.now)
            for replica in fleet.replicas:
                members.append(self._member(pool, replica, system.now))
                if replica in ready:
                    loads[replica.name] = _load(pool, replica, system, len(ready))
        return Signals(
            at=system.now,
            topology=Topology(
                instance_id="simulated",
                settling=False,
                members=tuple(sorted(members, key=lambda m: m.member_id)),
            ),
            replicas={pool: fleet.wanted for pool, fleet in system.fleets.items()},
            loads={name: LoadReport(at=system.now, load=load) for name, load in loads.items()},
        )

    def _member(self, pool: Pool, replica: Replica, now: float) -> MemberInfo:
        state = MemberState.LOADING
        if replica.leaves_at is not None:
            state = MemberState.DRAINING
        elif replica.is_ready(now):
            state = MemberState.READY
        key = replica.name, state
        if key not in self._members:
            self._members[key] = _member(pool, replica.name, state)
        return self._members[key]


def _member(pool: Pool, name: str, state: MemberState) -> MemberInfo:
    held: tuple[ShardSet, ...] = ()
    if pool.modality is not None:
        shards = (0,) if state is MemberState.READY else ()
        held = (ShardSet(modality=pool.modality, num_shards=1, shards=shards, max_shards=1),)
    role = _ROLES.get(pool, Role.EXPERT_POOL)
    return MemberInfo(member_id=name, role=role, address=name, state=state, shard_sets=held)


def _gateway(system: System) -> Load:
    has_encoder = bool(system.fleets[Pool.ENCODER].ready(system.now))
    return GatewayLoad(
        waiting_encoder=0 if has_encoder else len(system.images),
        media_items_total=system.num_media,
        plain_answers_total=system.num_plain,
        media_answers_total=system.num_media,
    )


def _load(pool: Pool, replica: Replica, system: System, ready: int) -> Load:
    """Queues are common in the simulation; each replica reports its part."""
    match pool:
        case Pool.ENCODER:
            waiting = sum(image.patches for image in system.images)
            oldest = min((image.since for image in system.images), default=system.now)
            return EncoderLoad(
                queued_items=_part(len(system.images), replica, system, ready)
                + (replica.job is not None),
                queued_patches=round(waiting / ready + replica.todo),
                admitted_patches_total=round(replica.admitted),
                encoded_patches_total=round(replica.done),
                busy_s_total=replica.busy_s,
                oldest_wait_s=system.now - oldest,
            )
        case Pool.DECODER:
            queued = sum(job.vision_tokens for job in system.vision)
            has_vision = bool(system.fleets[Pool.VISION_EXPERTS].ready(system.now))
            parked = 0 if has_vision else len(system.vision)
            return DecoderLoad(
                running_requests=_part(len(system.running), replica, system, ready),
                waiting_requests=_part(len(system.waiting) + parked, replica, system, ready),
                max_running_requests=MAX_RUNNING,
                kv_tokens_used=round(system.kv_used() / ready),
                kv_tokens_capacity=KV_TOKENS,
                queued_vision_tokens=round(queued / ready),
                vision_tokens_total=round(replica.seen),
                waiting_vision_pool=_part(parked, replica, system, ready),
                steps_total=round(replica.done),
                step_s_total=replica.busy_s,
                text_tokens_total=round(replica.read),
                plain_answers_total=round(replica.plain.answers),
                plain_held_s_total=replica.plain.held_s,
                plain_tokens_total=round(replica.plain.tokens),
                media_answers_total=round(replica.media.answers),
                media_held_s_total=replica.media.held_s,
                media_tokens_total=round(replica.media.tokens),
            )
        case _:
            return ExpertLoad(
                dispatches_total=round(replica.done),
                compute_s_total=replica.busy_s,
                queue_s_total=replica.queue_s,
                shards=(
                    ShardLoad(
                        shard=0,
                        tokens_total=round(replica.done),
                        compute_s_total=replica.busy_s,
                    ),
                ),
            )


def _part(count: int, replica: Replica, system: System, ready: int) -> int:
    """A replica's part of whole things: the first ones get what is left over."""
    fleet = next(f for f in system.fleets.values() if replica in f.replicas)
    index = fleet.ready(system.now).index(replica)
    return count // ready + (index < count % ready)
