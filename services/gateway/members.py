"""The search for a member that takes a piece of work, bounded by the time of parking."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import grpc

from chiasm import errors
from chiasm.membership import MemberInfo, Topology
from chiasm.services.gateway.deadline import Deadline
from chiasm.transport import status
from chiasm.transport.accepted import was_accepted
from chiasm.transport.membership import TopologyWatcher

_RETRY_PAUSE_S = 0.2


class BrokenOff(errors.Unavailable):
    """The end of a call that the member had taken in hand."""


async def call_error(call: grpc.aio.Call, failure: grpc.RpcError) -> errors.ChiasmError:
    """What a call to a member has ended with: BrokenOff where the member had it in hand and says no
    reason. A member that cancels our call is shutting down; and of a member that refuses a call
    while we still write to it, gRPC's client says INTERNAL by itself."""
    is_lost = failure.code() is grpc.StatusCode.INTERNAL and not status.has_details(failure)
    if is_lost or failure.code() is grpc.StatusCode.CANCELLED:
        error: errors.ChiasmError = errors.Unavailable(
            failure.details() or "the member ended the call"
        )
    else:
        error = status.from_rpc_error(failure)
    if error.reason != errors.Unavailable.default_reason:
        return error
    return BrokenOff(error.message) if await was_accepted(call) else error


def may_try_another(error: errors.ChiasmError) -> bool:
    """Whether the same call may go well elsewhere, or here a little later."""
    if isinstance(error, errors.ResourceExhausted):
        return error.retry_after_s is not None
    return isinstance(error, errors.Unavailable)


class Waiting:
    """How many searches have found nobody, and wait."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1


class MemberSearch:
    """One request's search.

    `candidates` gives the ready members that have not failed yet. When there are none it waits: for
    one to become ready, or before the failed ones are tried again, as none is given up for good: a
    moment, or as long as those that refused said. The time of parking starts with the first wait.
    """

    def __init__(
        self,
        topology: TopologyWatcher,
        ready: Callable[[Topology], tuple[MemberInfo, ...]],
        *,
        unavailable: errors.Unavailable,
        park_timeout_s: float,
        deadline: Deadline,
        waiting: Waiting,
    ) -> None:
        self._topology, self._ready, self._waiting = topology, ready, waiting
        self._error: errors.ChiasmError = unavailable
        self._park_timeout_s, self._deadline = park_timeout_s, deadline
        self._park: Deadline | None = None
        self._failed: dict[str, float] = {}
        self._has_waited_for_pools = False

    async def candidates(self) -> list[MemberInfo]:
        """At least one member.

        Raises `unavailable`, or the last refusal that gave a reason, when the request was parked
        too long; DeadlineExceeded when its deadline is over.
        """
        while True:
            if fresh := self._fresh(self._topology.current):
                return fresh
            await self._wait()

    def failed(self, member: MemberInfo, error: errors.ChiasmError) -> None:
        """Takes a member out until all have been tried.

        Raises the error when a second one says that an expert pool is away: each has waited for the
        pool, and all have the same.
        """
        self._failed[member.address] = max(error.retry_after_s or 0.0, _RETRY_PAUSE_S)
        if error.reason == errors.EXPERT_POOL_UNAVAILABLE:
            if self._has_waited_for_pools:
                raise error
            self._has_waited_for_pools = True
        if error.reason != errors.Unavailable.default_reason:
            error.retry_after_s = error.retry_after_s or self._error.retry_after_s
            self._error = error

    def _fresh(self, topology: Topology) -> list[MemberInfo]:
        return [m for m in self._ready(topology) if m.address not in self._failed]

    async def _wait(self) -> None:
        self._park = self._park or self._deadline.sooner(self._park_timeout_s)
        left_s = self._park.left_s()
        if left_s <= 0:
            self._deadline.remaining_s()
            raise self._error
        ready = self._ready(self._topology.current)
        if not ready:
            self._failed.clear()
        pause_s = min([left_s, *(self._failed[member.address] for member in ready)])
        try:
            with contextlib.nullcontext() if ready else self._waiting:
                await self._topology.wait_for(
                    lambda topology: bool(self._fresh(topology)),
                    timeout_s=pause_s,
                    what="the member",
                )
        except errors.Unavailable:
            self._failed.clear()
