"""Which servers hold which shards of a pool, and which of them can be reached.

The topology says who holds what; what this process sees for itself counts against it at once: a
server whose stream broke, or that did not answer in time, is away until it answers a probe. So a
death is noticed without the orchestrator, and a pool that is away costs one failed dispatch, not
one per step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import structlog
import torch

from chiasm.membership import Topology
from chiasm.transport.channel import open_channel
from chiasm.transport.membership import TopologyWatcher
from chiasm.transport.messages import CONTROL_BYTES
from chiasm.types import Modality, shard_experts
from chiasm.v1 import experts_pb2, experts_pb2_grpc

PROBE_TIMEOUT_S = 1.0
"""A server that has not answered a probe for this long is still away."""

PROBE_PAUSE_S = 0.1
"""Pause between two probes."""

log = structlog.get_logger()


class ShardHolders:
    """Of one pool. Used from the event loop only, but `is_covered` may be read from any thread.

    on_gone: called with the address of every server that the topology no longer lists.
    """

    def __init__(
        self,
        modality: Modality,
        watcher: TopologyWatcher,
        *,
        num_experts: int,
        on_gone: Callable[[str], None],
    ) -> None:
        self.num_shards = 0
        self.is_covered = False
        self._modality, self._num_experts, self._on_gone = modality, num_experts, on_gone
        self._topology = watcher.current
        self._listed: set[str] = set()
        self._away: dict[str, asyncio.Task[None]] = {}
        self._holders: dict[int, tuple[str, ...]] = {}
        self._shard_of = torch.zeros(num_experts, dtype=torch.long)
        watcher.subscribe(self._on_topology)
        self._on_topology(watcher.current)

    def of(self, shard: int) -> tuple[str, ...]:
        """Addresses of the servers that can compute a shard now."""
        return self._holders.get(shard, ())

    def shards_of(self, expert_ids: torch.Tensor) -> torch.Tensor:
        """The shard of each expert, int64."""
        return self._shard_of[expert_ids.cpu().long()]

    def lost(self, address: str) -> None:
        """Takes a server out until it answers again."""
        if address in self._listed and address not in self._away:
            log.warning("expert_server_away", modality=self._modality, address=address)
            self._away[address] = asyncio.create_task(self._probe(address), name=f"probe {address}")
            self._refresh()

    async def close(self) -> None:
        """Ends the probes."""
        probes = tuple(self._away.values())
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    def _on_topology(self, topology: Topology) -> None:
        self._topology = topology
        listed = {member.address for member in topology.members}
        for address in self._listed - listed:
            if probe := self._away.pop(address, None):
                probe.cancel()
            self._on_gone(address)
        self._listed = listed
        num_shards = topology.num_shards(self._modality)
        if num_shards != self.num_shards:
            self.num_shards = num_shards
            for shard in range(num_shards):
                experts = shard_experts(shard, num_shards, self._num_experts)
                self._shard_of[experts.start : experts.stop] = shard
        self._refresh()

    def _refresh(self) -> None:
        self._holders = {
            shard: tuple(
                member.address
                for member in self._topology.holders(self._modality, shard)
                if member.address not in self._away
            )
            for shard in range(self.num_shards)
        }
        self.is_covered = self.num_shards > 0 and all(self._holders.values())

    async def _probe(self, address: str) -> None:
        async with open_channel(address, max_message_bytes=CONTROL_BYTES) as channel:
            describe = experts_pb2_grpc.ExpertPoolStub(channel).Describe
            while True:
                try:
                    await describe(experts_pb2.DescribeRequest(), timeout=PROBE_TIMEOUT_S)
                    break
                except grpc.RpcError:
                    await asyncio.sleep(PROBE_PAUSE_S)
        log.info("expert_server_back", modality=self._modality, address=address)
        del self._away[address]
        self._refresh()
