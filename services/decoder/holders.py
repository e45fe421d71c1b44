"""Which servers hold which shards of a pool, and which of them can be reached.

The topology says who holds what; what this process sees for itself counts against it at once: a
server whose stream broke, or that did not answer in time, is away until it answers a probe. So a
death is noticed without the orchestrator, and a pool that is away costs one failed dispatch, not
one per step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import structlog

from chiasm.membership import Topology
from chiasm.services.decoder.link import Connection, ServerLink
from chiasm.services.decoder.work import Ints
from chiasm.transport.membership import TopologyWatcher
from chiasm.types import Modality, shard_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A pool at one moment. shard_of: int64 [E], the shard of each expert."""

    num_shards: int = 0
    shard_of: Ints
    holders: dict[int, tuple[Connection, ...]] = field(default_factory=dict)

    @property
    def is_covered(self) -> bool:
        """Whether each shard has a server that can be reached."""
        return self.num_shards > 0 and all(map(self.of, range(self.num_shards)))

    def of(self, shard: int) -> tuple[Connection, ...]:
        """The servers that can compute a shard now."""
        return tuple(c for c in self.holders.get(shard, ()) if not c.is_broken)


log = structlog.get_logger()


class ShardHolders:
    """Of one pool. For the event loop, but `placement`, always a whole one, is read by any thread.

    open_link: makes the link to a server; called with its address and what to call on a change.
    """

    def __init__(
        self,
        modality: Modality,
        watcher: TopologyWatcher,
        *,
        num_experts: int,
        open_link: Callable[[str, Callable[[], None]], ServerLink],
    ) -> None:
        self.placement = Placement(shard_of=np.zeros(num_experts, dtype=np.int64))
        self._modality, self._open_link = modality, open_link
        self._topology, self._weights = watcher.current, ""
        self._links: dict[str, ServerLink] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._unsubscribe = watcher.subscribe(self._on_topology)
        self._on_topology(watcher.current)

    async def close(self) -> None:
        """Closes all links."""
        self._unsubscribe()
        links = tuple(self._links.values())
        await asyncio.gather(*(link.close() for link in links), *self._closing)

    def _on_topology(self, topology: Topology) -> None:
        self._topology = topology
        # One that drains still answers what it has; it keeps its link for as long as it is listed.
        listed = {m.address for m in topology.members}
        for address in self._links.keys() - listed:
            task = asyncio.create_task(self._links.pop(address).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        for members in topology.pool(self._modality).holders.values():
            for member in members:
                if member.address not in self._links:
                    self._links[member.address] = self._open_link(member.address, self._refresh)
        self._refresh()

    def _refresh(self) -> None:
        pool = self._topology.pool(self._modality)
        num_shards = pool.num_shards
        shard_of = self.placement.shard_of
        if pool.weights != self._weights:
            log.info("pool_weights", modality=self._modality, old=self._weights, new=pool.weights)
            self._weights = pool.weights
        if num_shards != self.placement.num_shards:
            shard_of = np.zeros_like(shard_of)
            for shard in range(num_shards):
                shard_of[np.asarray(shard_experts(shard, num_shards, shard_of.size))] = shard
        connections = {address: link.connection for address, link in self._links.items()}
        self.placement = Placement(
            num_shards=num_shards,
            shard_of=shard_of,
            holders={
                shard: tuple(
                    connection
                    for member in pool.holders.get(shard, ())
                    if (connection := connections.get(member.address)) is not None
                )
                for shard in range(num_shards)
            },
        )
