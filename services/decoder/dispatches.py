"""One dispatch on its way: cut by server, hedged when one is slow, repeated when one fails.

Expert calls are pure, so a shard may be asked for twice, at one server after the other or at both
at once: whoever answers first, the bits are the same.
"""

from __future__ import annotations

import math
import time
from typing import Protocol

from chiasm import errors
from chiasm.model.moe import Partial
from chiasm.services.decoder.calls import Call
from chiasm.services.decoder.hedging import HedgePolicy
from chiasm.services.decoder.holders import Placement
from chiasm.services.decoder.inbox import Inbox
from chiasm.services.decoder.link import Connection, NoAnswer
from chiasm.services.decoder.pace import is_slow
from chiasm.services.decoder.work import Work
from chiasm.telemetry import metrics
from chiasm.transport.shared_memory import Arena
from chiasm.types import Modality
from chiasm.v1 import experts_pb2

RETRY_PAUSE_S = 0.05
"""Pause before the same holders are tried again, when no other is left."""

TIMED_TOKENS = 512
"""Timeouts are those of so many tokens; a dispatch of more has more time, in proportion."""

REFUSED_S = 1.0
"""How long a shard's holders may go on refusing before its pool counts as away."""

_TRANSIENT = (
    errors.Unavailable,
    errors.DeadlineExceeded,
    errors.DataLoss,
    errors.ResourceExhausted,
    errors.NotFound,
)
"""Failures that the same server may get over; any other is final once every holder has had it."""


def patience(num_tokens: int) -> float:
    """How many times its timeouts a dispatch may take."""
    return max(1.0, num_tokens / TIMED_TOKENS)


class PoolUnavailable(errors.Unavailable):
    """A pool could not answer within the dispatch's time over all attempts."""

    def __init__(self, modality: Modality, message: str) -> None:
        super().__init__(message, reason=errors.EXPERT_POOL_UNAVAILABLE, retry_after_s=1.0)
        self.modality = modality


class PoolFailed(errors.Internal):
    """A pool cannot compute what it was asked for, and asking again would not help; the cause says
    why. What the cause blames is the decoder's message, never the caller's request."""

    def __init__(self, modality: Modality) -> None:
        super().__init__(f"the {modality} expert pool failed; the log has the request id")
        self.modality = modality


class Servers(Protocol):
    """What a dispatch needs of its pool."""

    inbox: Inbox
    hedging: HedgePolicy
    attempt_timeout_s: float

    @property
    def placement(self) -> Placement: ...

    def rest(self) -> None:
        """It refuses what it is asked: nothing is to be asked of it for a moment."""
        ...


class Flight:
    """One dispatch under way; an Owner of its calls. For the engine's thread."""

    def __init__(self, servers: Servers, work: Work, *, timeout_s: float) -> None:
        self._servers, self._work = servers, work
        self._end = time.monotonic() + timeout_s * patience(work.num_tokens)
        self._missing = set(work.shards)
        self._found: list[Partial] = []
        self._calls: dict[Call, Connection] = {}
        self._failed: dict[str, errors.ChiasmError] = {}  # by address: not to be tried for now
        self._retry_at = 0.0
        self._refused_since = math.inf
        self._num_rounds = 0
        self._last_error: errors.ChiasmError = errors.Unavailable("no server can be reached")
        self._send_missing(time.monotonic())

    def result(self, timeout_s: float) -> list[Partial]:
        """Every shard's partial, once all are there.

        Raises PoolUnavailable as soon as a shard has no holder that can be reached, or once its
        holders have refused for REFUSED_S: the engine must not stand still for one pool, it begins
        the step again when the pool is back. Raises PoolFailed when every holder of a shard has
        refused for good.
        """
        end = min(self._end, time.monotonic() + timeout_s)
        try:
            while self._missing:
                due_s = min(self._next_event(), end) - time.monotonic()
                self._servers.inbox.wait(max(0.0, due_s))
                if self._missing:
                    self._advance(time.monotonic(), end)
        finally:
            self._missing.clear()  # answers that come now are nobody's
        return self._found

    def answered(
        self, call: Call, response: experts_pb2.DispatchResponse, arena: Arena | None
    ) -> None:
        connection = self._calls.pop(call)
        if response.WhichOneof("result") != "partials":
            error = response.error
            failure = errors.from_code(error.code, f"{call.address}: {error.message}")
            self._failure(call, connection, failure)
            return
        now = time.monotonic()
        self._servers.hedging.answered(len(call.part.rows), now - call.sent)
        if not self._missing.isdisjoint(call.part.shards):
            try:
                partials = self._work.partials(call.part, response.partials, arena)
            except errors.DataLoss as damage:
                self._failure(call, connection, damage)
                connection.damaged(damage)
                return
            self._found += [p for p in partials if p.shard in self._missing]
            self._missing.difference_update(call.part.shards)
            connection.damaged(None)
            if call.is_hedge:
                metrics.HEDGES.labels(str(self._work.modality), "won").inc()
        connection.pace.add(self._work.num_tokens, now - call.sent, now)
        call.end()

    def failed(self, call: Call, error: errors.ChiasmError) -> None:
        self._failure(call, self._calls.pop(call), error)

    def _failure(self, call: Call, connection: Connection, error: errors.ChiasmError) -> None:
        call.end(error)
        connection.pace.fail(time.monotonic())
        self._failed[call.address] = error
        self._last_error = error
        metrics.DISPATCH_ATTEMPTS_FAILED.labels(str(self._work.modality), error.reason).inc()

    def _next_event(self) -> float:
        """When there is something to do though nothing arrives."""
        times = [min(call.hedge_at, call.deadline) for call in self._calls]
        if self._idle_shards():
            times.append(self._retry_at)
        return min(times)

    def _advance(self, now: float, end: float) -> None:
        for call, connection in tuple(self._calls.items()):
            if now >= call.deadline:
                connection.lose(NoAnswer(f"{call.address} is silent for {call.timeout_s:.1f} s"))
        if now >= end:
            raise self._unavailable()
        idle = self._idle_shards()
        if idle and now >= self._retry_at:
            if not self._can_compute(idle):
                raise self._unavailable()
            self._send_missing(now)
        if late := [call for call in self._calls if now >= call.hedge_at]:
            self._hedge(late)

    def _idle_shards(self) -> set[int]:
        """Missing shards that no server is asked for."""
        return self._missing.difference(*(call.part.shards for call in self._calls))

    def _can_compute(self, shards: set[int]) -> bool:
        """Whether the pool is still cut as it was and each of the shards has a holder."""
        placement = self._servers.placement
        return placement.num_shards == self._work.num_shards and all(map(placement.of, shards))

    def _unavailable(self) -> PoolUnavailable:
        modality = self._work.modality
        return PoolUnavailable(
            modality,
            f"{modality} shards {sorted(self._missing)} are not available: {self._last_error}",
        )

    def _send_missing(self, now: float) -> None:
        plan, unplaced = self._plan(self._idle_shards())
        if unplaced:
            self._refused(unplaced, now)
        if plan:
            self._servers.hedging.sent()
            for connection, shards in plan.items():
                self._send(connection, shards)
            self._num_rounds += 1

    def _refused(self, shards: set[int], now: float) -> None:
        """No holder of these is left to be asked: all may be asked again, after a pause."""
        for shard in shards:
            reasons = [self._failed.get(c.address) for c in self._servers.placement.of(shard)]
            if reasons and not any(e is None or isinstance(e, _TRANSIENT) for e in reasons):
                raise PoolFailed(self._work.modality) from reasons[-1]
        self._refused_since = min(self._refused_since, now)
        if now >= self._refused_since + REFUSED_S:
            self._servers.rest()
            raise self._unavailable()
        self._retry_at = now + RETRY_PAUSE_S if self._failed else now
        self._failed.clear()

    def _hedge(self, late: list[Call]) -> None:
        """Asks replicas for what late calls were sent for, where there are any and it may."""
        for call in late:
            call.hedge_at = math.inf
        plan, _ = self._plan(self._missing & {s for call in late for s in call.part.shards})
        if not plan:
            return
        is_allowed = self._servers.hedging.may_hedge()
        outcome = "sent" if is_allowed else "denied"
        metrics.HEDGES.labels(str(self._work.modality), outcome).inc()
        if is_allowed:
            for connection, shards in plan.items():
                self._send(connection, shards, is_hedge=True)

    def _send(self, connection: Connection, shards: list[int], *, is_hedge: bool = False) -> None:
        part = self._work.part(shards)
        call = Call(
            self,
            self._work,
            part,
            connection.address,
            attempt=self._num_rounds,
            timeout_s=self._servers.attempt_timeout_s * patience(len(part.rows)),
            hedge_delay_s=self._servers.hedging.delay_s(len(part.rows)),
            is_hedge=is_hedge,
        )
        try:
            connection.send(call)
            self._calls[call] = connection
        except errors.Unavailable as error:
            self._failure(call, connection, error)

    def _plan(self, shards: set[int]) -> tuple[dict[Connection, list[int]], set[int]]:
        """A holder for each shard, and the shards that have none left.

        Holders that have failed, or are asked for the shard already, are passed over.
        """
        placement, now = self._servers.placement, time.monotonic()
        asked = {(call.address, shard) for call in self._calls for shard in call.part.shards}
        plan: dict[Connection, list[int]] = {}
        unplaced = set()
        for shard in sorted(shards):
            holders = [
                c
                for c in placement.of(shard)
                if c.address not in self._failed and (c.address, shard) not in asked
            ]
            if not holders:
                unplaced.add(shard)
                continue
            plan.setdefault(self._best(holders, plan, now), []).append(shard)
        return plan, unplaced

    def _best(
        self, holders: list[Connection], plan: dict[Connection, list[int]], now: float
    ) -> Connection:
        """Neither late nor slow, then in the plan, which takes another shard for free, then with
        least to do."""
        late = {c for c in holders if _is_late(c, now)}
        mean_s = {c: c.pace.mean_s(self._work.num_tokens, now) for c in holders}
        best_s = min(mean_s[c] for c in holders if c not in late or len(late) == len(holders))
        return min(
            holders,
            key=lambda c: (c in late, is_slow(mean_s[c], best_s), c not in plan, c.num_calls),
        )


def _is_late(connection: Connection, now: float) -> bool:
    """Whether a server has let something wait for so long that it was, or would be, hedged."""
    oldest = connection.oldest()
    return oldest is not None and now >= oldest.late_at
