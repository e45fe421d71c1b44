"""Replicas by the orchestrator's orders: the launcher's half of `Orchestrator.Scale`."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from signal import SIGTERM

import grpc
import structlog

from chiasm.child import Child
from chiasm.transport.channel import open_blocking_channel
from chiasm.transport.messages import CONTROL_BYTES
from chiasm.v1 import control_pb2, control_pb2_grpc

RETRY_S = 0.5
"""Pause before the orchestrator is asked again."""

RESPAWN_S = 2.0
"""Least time from one start of a pool's process to the next that replaces a dead one; doubled with
every process that dies young, up to RESPAWN_MAX_S."""

RESPAWN_MAX_S = 60.0

log = structlog.get_logger()


class Orders:
    """Follows the orchestrator's orders in a thread; `current` is the last one."""

    def __init__(self, orchestrator: str, replicas: Mapping[int, int]) -> None:
        self.current: control_pb2.ScaleOrder | None = None
        self._orchestrator = orchestrator
        self._replicas = dict(replicas)
        self._closing = threading.Event()
        self._call: grpc.Call | None = None
        self._thread = threading.Thread(target=self._run, name="orders", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops following."""
        self._closing.set()
        if self._call is not None:
            self._call.cancel()  # type: ignore[no-untyped-call]  # no annotations there
        self._thread.join(RETRY_S)

    def _run(self) -> None:
        told = ""
        while not self._closing.is_set():
            try:
                self._follow()
                told = ""
            except grpc.RpcError as error:
                reason = str(getattr(error, "details", str)())
                if not self._closing.is_set() and told != (told := reason):
                    log.warning("no_orders", error=told)
            self._closing.wait(RETRY_S)

    def _follow(self) -> None:
        report = control_pb2.ScaleReport(
            pools=[
                control_pb2.PoolReplicas(pool=pool, replicas=count)  # type: ignore[arg-type] # int
                for pool, count in self._replicas.items()
            ]
        )
        with open_blocking_channel(self._orchestrator, max_message_bytes=CONTROL_BYTES) as channel:
            self._call = call = control_pb2_grpc.OrchestratorStub(channel).Scale(report)
            for order in call:
                self.current = order
                self._replicas = {entry.pool: entry.replicas for entry in order.pools}


@dataclass(slots=True)
class _Pool:
    started_at: float = 0.0
    pause_s: float = RESPAWN_S
    count: int = 0


class Replicas:
    """Keeps the processes of each pool at the number that was ordered.

    children: all processes, by name; those of a pool are the ones that `pool_of` says.
    spawn: starts the `index`-th process of a pool, and adds it to the children.
    grace_s: how long a process that is to go may drain.
    """

    def __init__(
        self,
        children: dict[str, Child],
        *,
        pool_of: Callable[[str], int | None],
        spawn: Callable[[int, int], None],
        grace_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._children, self._pool_of, self._spawn = children, pool_of, spawn
        self._grace_s, self._clock = grace_s, clock
        self.replaced: list[Child] = []
        """Processes that died and were replaced, until somebody takes note and clears it."""
        self._pools: dict[int, _Pool] = {}
        self._ending: dict[str, float] = {}

    def counts(self) -> Mapping[int, int]:
        """Processes of each pool now."""
        counts: dict[int, int] = {}
        for name in self._children:
            if (pool := self._pool_of(name)) is not None:
                counts[pool] = counts.get(pool, 0) + 1
        return counts

    def step(self, order: control_pb2.ScaleOrder) -> None:
        """Starts and stops what the order asks for; returns at once."""
        self._reap()
        for entry in order.pools:
            running = [
                name
                for name, child in self._children.items()
                if self._pool_of(name) == entry.pool
                and name not in self._ending
                and child.exit_code is None
            ]
            for _ in range(entry.replicas - len(running)):
                if not self._start(entry.pool):
                    break
            surplus = len(running) - entry.replicas
            for name in self._order(running, order.retired_addresses)[: max(0, surplus)]:
                log.info("stopping", process=name)
                self._children[name].signal(SIGTERM)
                self._ending[name] = self._clock() + self._grace_s

    def is_ending(self, name: str) -> bool:
        """Whether a process has been told to go."""
        return name in self._ending

    def _order(self, running: Sequence[str], retired: Collection[str]) -> list[str]:
        """Those that were drained first, then the youngest."""
        youngest = list(reversed(running))
        youngest.sort(key=lambda name: self._children[name].address() not in retired)
        return youngest

    def _start(self, number: int) -> bool:
        """Starts one more; False while the last one has died too recently."""
        pool, now = self._pools.setdefault(number, _Pool()), self._clock()
        age_s = now - pool.started_at if pool.count else math.inf
        dead = [
            name
            for name, child in self._children.items()
            if self._pool_of(name) == number
            and name not in self._ending
            and child.exit_code is not None
        ]
        if dead and age_s < pool.pause_s:
            return False
        died_young = bool(dead) and age_s < RESPAWN_MAX_S
        pool.pause_s = min(2 * pool.pause_s, RESPAWN_MAX_S) if died_young else RESPAWN_S
        for name in dead:
            child = self._children.pop(name)
            child.end(0.0)
            self.replaced.append(child)
        pool.count, pool.started_at = pool.count + 1, now
        self._spawn(number, pool.count)
        return True

    def _reap(self) -> None:
        """Ends what drains for too long, and forgets what has ended."""
        for name, deadline in tuple(self._ending.items()):
            child = self._children[name]
            if child.exit_code is None and self._clock() < deadline:
                continue
            if not child.end(0.0):
                log.warning("killed", process=name, after_s=self._grace_s)
            del self._children[name], self._ending[name]
