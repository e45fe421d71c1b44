"""The control service: decode a report, put it into the table, tell the watchers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import structlog

from chiasm import errors
from chiasm.membership import MemberState, Role, Topology
from chiasm.orchestrator.launcher import Launcher
from chiasm.orchestrator.members import Membership
from chiasm.orchestrator.relay import is_relayed
from chiasm.telemetry import metrics
from chiasm.transport import loads
from chiasm.transport.topology import member_from_proto, topology_to_proto
from chiasm.types import Modality
from chiasm.v1 import control_pb2, control_pb2_grpc

log = structlog.get_logger()


class _Places:
    """A bounded number of streams of one kind."""

    def __init__(self, limit: int, what: str) -> None:
        self._free, self._what = limit, what

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Holds one place; raises ResourceExhausted when all are taken."""
        if not self._free:
            raise errors.ResourceExhausted(f"too many {self._what}", retry_after_s=1.0)
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1


class OrchestratorServicer(control_pb2_grpc.OrchestratorServicer):
    """Serves one `Membership` to at most `max_members` members and `max_watchers` watchers.

    launcher: passes orders to a launcher of processes; None where somebody else runs the replicas.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        lease_s: float,
        max_members: int,
        max_watchers: int,
        launcher: Launcher | None = None,
    ) -> None:
        self._membership, self._launcher = membership, launcher
        self._lease_s = lease_s
        self._joins = _Places(max_members, "members")
        self._watches = _Places(max_watchers, "watchers")
        self._sessions = itertools.count(1)
        self._changed = asyncio.Event()
        self._told: Topology | None = None
        self._is_closing = False

    async def Join(
        self, request_iterator: AsyncIterator[control_pb2.MemberReport], context: Any
    ) -> AsyncIterator[control_pb2.Assignment]:
        """Keeps a member for as long as its stream and its reports go on."""
        session, member_id, has_left = next(self._sessions), "", False
        assignment = control_pb2.Assignment(lease_ms=round(self._lease_s * 1000))
        with self._joins.take():
            try:
                async for report in request_iterator:
                    member = member_from_proto(report)
                    if member_id not in ("", member.member_id):
                        raise errors.InvalidArgument("member_id", "must not change in a stream")
                    self._membership.report(
                        member, session=session, now=time.monotonic(), load=loads.detach(report)
                    )
                    has_left = member.state is MemberState.DRAINING
                    if not member_id:
                        log.info("member_joined", member=member.member_id, address=member.address)
                        member_id = member.member_id
                    self._notify()
                    yield assignment
            finally:
                # At the end of our own life all streams end, and nobody has left for it.
                if member_id and not self._is_closing:
                    is_direct = not is_relayed(context.invocation_metadata() or ())
                    self._end(member_id, session, is_certain=has_left or is_direct)

    def _end(self, member_id: str, session: int, *, is_certain: bool) -> None:
        """Takes a member out whose stream has ended. One that a follower passed on may have ended
        with the follower: its member has time to come back."""
        log.info("member_left", member=member_id, is_certain=is_certain)
        lose = self._membership.end if is_certain else self._membership.detach
        lose(member_id, session=session, now=time.monotonic())
        self._notify()

    async def WatchTopology(
        self, request: control_pb2.WatchTopologyRequest, context: Any
    ) -> AsyncIterator[control_pb2.Topology]:
        """The topology now and after changes; a slow watcher skips the versions in between."""
        sent = None
        with self._watches.take():
            while not self._is_closing:
                topology, changed = self._membership.topology, self._changed
                if topology is not sent:
                    sent = topology
                    yield topology_to_proto(topology)
                else:
                    await changed.wait()

    async def Scale(
        self, request: control_pb2.ScaleReport, context: Any
    ) -> AsyncIterator[control_pb2.ScaleOrder]:
        """Orders for the launcher, until another one comes."""
        if self._launcher is None:
            raise errors.FailedPrecondition(
                "this orchestrator has no use for a launcher", reason="SCALED_ELSEWHERE"
            )
        async for order in self._launcher.orders(request):
            yield order

    async def changed(self, known: Topology) -> None:
        """Returns when the topology is another than the one known."""
        while self._membership.topology is known:
            await self._changed.wait()

    async def run_leases(self) -> None:
        """Ends leases as they run out, until cancelled."""
        while True:
            for member in self._membership.expire(time.monotonic()):
                log.warning("lease_expired", member=member.member_id, address=member.address)
            self._notify()
            await asyncio.sleep(self._membership.tick_s)

    async def close(self) -> None:
        """Ends the watches; members whose streams end from now on do not count as gone."""
        self._is_closing = True
        if self._launcher is not None:
            self._launcher.end()
        self._notify()

    def _notify(self) -> None:
        """Wakes the watchers if there is something they do not know."""
        if self._told is self._membership.topology and not self._is_closing:
            return
        self._told = self._membership.topology
        _export(self._told)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _export(topology: Topology) -> None:
    metrics.TOPOLOGY_VERSION.set(topology.version)
    counts = Counter((member.role, member.state) for member in topology.members)
    for role in Role:
        for state in MemberState:
            metrics.MEMBERS.labels(role, state).set(counts[role, state])
    for modality in Modality:
        metrics.POOL_SHARDS.labels(modality).set(topology.num_shards(modality))
        metrics.POOL_SHARDS_MISSING.labels(modality).set(len(topology.missing(modality)))
