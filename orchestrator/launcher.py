"""The local backend: orders to the one process that owns the replicas, such as `chiasm up`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

import structlog

from chiasm import errors
from chiasm.membership import MemberInfo
from chiasm.orchestrator.types import Pool
from chiasm.v1 import control_pb2

MAX_REPLICAS = 1024
"""Most replicas a launcher may report of one pool."""

MAX_RETIRED = 64
"""How many of the last members to have been retired an order names."""

WIRE_POOLS = {
    Pool.ENCODER: control_pb2.POOL_ENCODER,
    Pool.DECODER: control_pb2.POOL_DECODER,
    Pool.TEXT_EXPERTS: control_pb2.POOL_TEXT_EXPERTS,
    Pool.VISION_EXPERTS: control_pb2.POOL_VISION_EXPERTS,
}
_POOLS = {wire: pool for pool, wire in WIRE_POOLS.items()}

log = structlog.get_logger()


class Launcher:
    """A `Backend`. The launcher's own numbers count when it comes, and ours from then on."""

    def __init__(self) -> None:
        self._wanted: dict[Pool, int] = {}
        self._leaving: dict[Pool, str] = {}
        self._retired: list[str] = []
        self._session = 0
        self._is_there = self._is_closed = False
        self._changed = asyncio.Event()

    async def orders(
        self, report: control_pb2.ScaleReport
    ) -> AsyncGenerator[control_pb2.ScaleOrder, None]:
        """What a launcher shall run: now, and after every change until another launcher comes.

        Raises InvalidArgument for a report that cannot be.
        """
        self._wanted = _read(report)
        self._session, self._is_there = self._session + 1, True
        session, sent = self._session, None
        self._notify()
        log.info("launcher_joined", replicas=dict(self._wanted))
        try:
            while session == self._session and not self._is_closed:
                changed, order = self._changed, self._order()
                if order != sent:
                    sent = order
                    yield order
                else:
                    await changed.wait()
        finally:
            if session == self._session:
                self._is_there = False
                log.warning("launcher_left")

    def end(self) -> None:
        """Ends the stream of orders."""
        self._is_closed = True
        self._notify()

    async def replicas(self) -> Mapping[Pool, int]:
        self._check()
        return dict(self._wanted)

    async def scale(self, pool: Pool, replicas: int) -> None:
        self._check()
        if pool not in self._wanted:
            raise errors.NotFound(f"the launcher has no {pool}")
        leaving = self._leaving.pop(pool, None)
        if leaving is not None and replicas < self._wanted[pool]:
            self._retired = [*self._retired, leaving][-MAX_RETIRED:]
        self._wanted[pool] = replicas
        self._notify()

    async def retire(self, pool: Pool, ranked: Sequence[MemberInfo]) -> MemberInfo | None:
        if len(ranked) < self._wanted.get(pool, 0):
            self._leaving.pop(pool, None)
            return None
        self._leaving[pool] = ranked[0].address
        return ranked[0]

    async def close(self) -> None:
        self.end()

    def _check(self) -> None:
        if not self._is_there:
            raise errors.Unavailable("there is no launcher")

    def _order(self) -> control_pb2.ScaleOrder:
        return control_pb2.ScaleOrder(
            pools=[
                control_pb2.PoolReplicas(pool=WIRE_POOLS[pool], replicas=replicas)
                for pool, replicas in sorted(self._wanted.items())
            ],
            retired_addresses=self._retired,
        )

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _read(report: control_pb2.ScaleReport) -> dict[Pool, int]:
    wanted: dict[Pool, int] = {}
    for index, entry in enumerate(report.pools):
        if entry.pool not in _POOLS:
            raise errors.InvalidArgument(f"pools[{index}].pool", f"unknown pool {entry.pool}")
        if entry.replicas > MAX_REPLICAS:
            raise errors.InvalidArgument(f"pools[{index}].replicas", f"above {MAX_REPLICAS}")
        wanted[_POOLS[entry.pool]] = entry.replicas
    return wanted
