"""An expert pool across processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from chiasm.model.moe import Dispatch
from chiasm.services.decoder.dispatches import Flight, PoolUnavailable
from chiasm.services.decoder.hedging import HedgePolicy
from chiasm.services.decoder.holders import Placement, ShardHolders
from chiasm.services.decoder.inbox import Inbox
from chiasm.services.decoder.link import NoAnswer, ServerLink
from chiasm.services.decoder.work import Work
from chiasm.transport.membership import TopologyWatcher
from chiasm.types import Modality

EXPIRY_PERIOD_S = 0.1
"""How often a pool looks for calls that nobody waits for any more and that nobody answers."""


REST_S = 0.5
"""How long a pool that refuses is not asked: requests that do without it go on meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSettings:
    """How a pool treats its servers.

    attempt_timeout_s: a server that says nothing for so long is away. timeout_s: of a dispatch over
    all attempts. hedge_budget, hedge_after_s: see HedgePolicy. use_lane: whether servers of the
    same host are reached through shared memory. max_message_bytes: of a dispatch, of an answer.
    """

    attempt_timeout_s: float
    timeout_s: float
    hedge_budget: float
    hedge_after_s: float
    use_lane: bool
    max_message_bytes: int


class RemotePool:
    """Made in the event loop; `begin` and its answers are for the engine's thread."""

    def __init__(
        self,
        modality: Modality,
        watcher: TopologyWatcher,
        settings: RemoteSettings,
        *,
        num_experts: int,
    ) -> None:
        self.inbox = Inbox()
        self.hedging = HedgePolicy(budget=settings.hedge_budget, after_s=settings.hedge_after_s)
        self.attempt_timeout_s = settings.attempt_timeout_s
        self._modality, self._settings = modality, settings
        self._next_expiry = 0.0
        self._rests_until = 0.0
        self._holders = ShardHolders(
            modality, watcher, num_experts=num_experts, open_link=self._open_link
        )

    @property
    def placement(self) -> Placement:
        """The pool as it is now."""
        return self._holders.placement

    @property
    def is_covered(self) -> bool:
        return self.placement.is_covered and time.monotonic() >= self._rests_until

    def rest(self) -> None:
        """Is not covered for REST_S."""
        self._rests_until = time.monotonic() + REST_S

    def begin(self, dispatch: Dispatch) -> Flight:
        """Sends a dispatch off. Raises PoolUnavailable while no server is known."""
        self.tidy()
        placement = self.placement
        if not placement.num_shards:
            raise PoolUnavailable(self._modality, f"the {self._modality} pool has no servers")
        work = Work(dispatch, placement.shard_of, placement.num_shards)
        return Flight(self, work, timeout_s=self._settings.timeout_s)

    def tidy(self) -> None:
        """Sees to what has arrived, and to servers that are silent."""
        self.inbox.handle_posted()
        self._expire(time.monotonic())

    async def close(self) -> None:
        """Closes the links. The engine must have ended."""
        await self._holders.close()
        self.inbox.close()

    def _open_link(self, address: str, on_change: Callable[[], None]) -> ServerLink:
        return ServerLink(
            address,
            self._modality,
            self.inbox,
            max_message_bytes=self._settings.max_message_bytes,
            use_lane=self._settings.use_lane,
            on_change=on_change,
        )

    def _expire(self, now: float) -> None:
        """Takes out servers that a replica has answered for, and that are still silent."""
        if now < self._next_expiry:
            return
        self._next_expiry = now + EXPIRY_PERIOD_S
        self.inbox.wait(0)  # what has arrived while nobody waited counts
        connections = {c for holders in self.placement.holders.values() for c in holders}
        for connection in connections:
            oldest = connection.oldest()
            if oldest is not None and now >= oldest.deadline:
                connection.lose(NoAnswer(f"{connection.address} is silent"))
