"""The table of members and their leases: pure, with the time passed in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from chiasm import errors
from chiasm.load import Load
from chiasm.membership import MemberInfo, MemberState, Role, Topology
from chiasm.orchestrator.types import LoadReport

STILL_S = 4.0
"""Between two ticks so far apart the orchestrator stood still; sooner than members give up on a
stream that does not answer (`transport.membership.ANSWER_TIMEOUT_S`)."""

RETURN_S = 3.0
"""How long a member may take to come back when whoever passed its stream on has gone: a failed
attempt and a pause of `transport.membership`."""


@dataclass(slots=True)
class _Entry:
    member: MemberInfo
    session: int
    deadline: float
    load: LoadReport | None


class Membership:
    """Members, each kept by a session (one stream of reports) and a lease.

    `topology` is a new value with the next version after every change. For one lease after the
    start it is settling: members of an earlier life of the orchestrator are still on their way
    back. So they are after the orchestrator stood still, or was cut off and heard nobody for half a
    lease: then it settles until a lease after somebody is heard again. Times are seconds of one
    monotonic clock.
    """

    def __init__(self, *, instance_id: str, lease_s: float, max_members: int, now: float) -> None:
        self.topology = Topology(instance_id=instance_id, version=1, settling=True)
        self._lease_s = lease_s
        self._still_s = min(STILL_S, lease_s / 2)
        self._max_members = max_members
        self._settled_at = now + lease_s
        self._ticked = self._heard_at = now
        self._entries: dict[str, _Entry] = {}

    @property
    def tick_s(self) -> float:
        """How often `expire` wants to be called."""
        return self._still_s / 5

    @property
    def loads(self) -> Mapping[str, LoadReport]:
        """The last load of each member that has reported one, by member_id."""
        return {key: e.load for key, e in self._entries.items() if e.load is not None}

    def report(
        self, member: MemberInfo, *, session: int, now: float, load: Load | None = None
    ) -> None:
        """Adds or updates a member and renews its lease; a newer session takes it over.

        Raises ResourceExhausted when the table is full, FailedPrecondition when an expert server
        cuts its pool into another number of shards than those that are there.
        """
        known = self._entries.get(member.member_id)
        if known is None and len(self._entries) >= self._max_members:
            raise errors.ResourceExhausted(
                f"there are {self._max_members} members already", retry_after_s=self._lease_s
            )
        self._check_cut(member)
        if self._is_deaf(now) and (self._entries or math.isinf(self._settled_at)):
            self._settled_at = now + self._lease_s
        self._heard_at = now
        last = known.load if known is not None else None
        self._entries[member.member_id] = _Entry(
            member=member,
            session=session,
            deadline=now + self._lease_s,
            load=LoadReport(at=now, load=load) if load is not None else last,
        )
        is_new = known is None or known.member != member
        if is_new or self.topology.settling != (now < self._settled_at):
            self._publish(now)

    def end(self, member_id: str, *, session: int, now: float) -> None:
        """Removes a member whose session has ended, unless a newer session keeps it."""
        entry = self._entries.get(member_id)
        if entry is not None and entry.session == session:
            del self._entries[member_id]
            if entry.member.state is not MemberState.DRAINING:
                self._settle_if_deaf(now)
            self._publish(now)

    def detach(self, member_id: str, *, session: int, now: float) -> None:
        """Lets a member go RETURN_S from now, sooner with its lease, unless a newer session comes:
        its stream broke, and the member may be well."""
        entry = self._entries.get(member_id)
        if entry is not None and entry.session == session:
            entry.deadline = min(entry.deadline, now + RETURN_S)

    def expire(self, now: float) -> tuple[MemberInfo, ...]:
        """Removes members whose lease has run out and ends settling; returns those removed.

        Call it every `tick_s`. A far longer gap means that the orchestrator itself stood still and
        reports wait unread, so no lease runs on during it, and it settles again.
        """
        gap, self._ticked = now - self._ticked, now
        if gap > self._still_s:
            latest = now + self._lease_s
            self._settled_at = max(self._settled_at, latest)
            for entry in self._entries.values():
                entry.deadline = min(entry.deadline + gap, latest)
        expired = tuple(e.member for e in self._entries.values() if e.deadline <= now)
        for member in expired:
            del self._entries[member.member_id]
            self._settle_if_deaf(now)
        if expired or self.topology.settling != (now < self._settled_at):
            self._publish(now)
        return expired

    def _is_deaf(self, now: float) -> bool:
        return now - self._ticked > self._still_s or now - self._heard_at > self._lease_s / 2

    def _settle_if_deaf(self, now: float) -> None:
        """Who is lost while nobody is heard may be well, and come back."""
        if self._is_deaf(now):
            self._settled_at = math.inf

    def _check_cut(self, member: MemberInfo) -> None:
        if member.role is not Role.EXPERT_POOL:
            return
        others = [e.member for e in self._entries.values() if e.member.role is Role.EXPERT_POOL]
        for index, held in enumerate(member.shard_sets):
            for other in others:
                theirs = other.shard_set(held.modality)
                if (
                    other.member_id != member.member_id
                    and theirs is not None
                    and theirs.num_shards != held.num_shards
                ):
                    raise errors.FailedPrecondition(
                        f"the {held.modality} pool is cut into {theirs.num_shards} shards, "
                        f"not {held.num_shards}",
                        field=f"shard_sets[{index}].num_shards",
                    )

    def _publish(self, now: float) -> None:
        self.topology = Topology(
            instance_id=self.topology.instance_id,
            version=self.topology.version + 1,
            settling=now < self._settled_at,
            members=tuple(self._entries[key].member for key in sorted(self._entries)),
        )
