"""A process's ties to the orchestrator.

`Member` keeps it in the topology, `TopologyWatcher` follows the topology. Both reconnect for ever
and neither stands on the token path: while the orchestrator is away, everyone goes on with what was
known last.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import structlog

from chiasm import errors
from chiasm.load import Load
from chiasm.membership import MemberInfo, MemberState, Topology
from chiasm.transport import loads, status
from chiasm.transport.channel import open_channel
from chiasm.transport.messages import CONTROL_BYTES
from chiasm.transport.topology import member_to_proto, topology_from_proto
from chiasm.v1 import control_pb2, control_pb2_grpc

ANSWER_TIMEOUT_S = 5.0
"""An orchestrator that has not answered a report for this long is taken for lost."""

RETRY_FIRST_S, RETRY_MAX_S = 0.05, 1.0
"""First and longest pause before another try to reach the orchestrator; both are jittered."""

REPORTS_PER_LEASE = 3

log = structlog.get_logger()


class Member:
    """Keeps this process in the topology.

    `start` begins to report, `update` changes the report and sends it at once, `leave` ends the
    membership. Without an orchestrator address all of them do nothing but keep `report`, so that a
    service runs alone. Use from one event loop only.

    load: asked at every report how busy the process is.
    """

    def __init__(self, orchestrator: str, report: MemberInfo) -> None:
        self.report = report
        self.load: Callable[[], Load | None] = lambda: None
        self._orchestrator = orchestrator
        self._changed = asyncio.Event()
        self._joined = False
        self._leaving = False
        self._retry_max_s = RETRY_MAX_S
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Joins in the background and stays joined until `leave` or `close`."""
        if self._orchestrator and self._task is None:
            self._task = asyncio.create_task(self._run(), name="member")

    def update(self, **changes: Any) -> None:
        """Changes fields of the report, as `dataclasses.replace` does, and sends it."""
        report = replace(self.report, **changes)
        if report != self.report:
            self.report = report
            self._changed.set()

    async def leave(self, timeout_s: float = 1.0) -> None:
        """Reports DRAINING, if that was not said before, and ends the membership."""
        self.update(state=MemberState.DRAINING)
        self._leaving = True
        self._changed.set()
        if self._task is not None and self._joined:
            await asyncio.wait({self._task}, timeout=timeout_s)
        await self.close()

    async def close(self) -> None:
        """Ends the membership without a word; the orchestrator sees the stream end."""
        await _cancel(self._task)
        self._task = None

    async def _run(self) -> None:
        pauses, told = _pauses(RETRY_MAX_S), ""
        while not self._leaving:
            try:
                async with open_channel(
                    self._orchestrator, max_message_bytes=CONTROL_BYTES
                ) as channel:
                    await self._stay(control_pb2_grpc.OrchestratorStub(channel).Join())
            except Exception as error:
                # Whatever it is, giving up would take this process out of the system for good.
                if self._joined:
                    pauses, told = _pauses(self._retry_max_s), ""
                self._joined = False
                if told != (told := _describe(error)):
                    log.warning("not_joined", error=told)
                await asyncio.sleep(next(pauses))

    async def _stay(self, call: Any) -> None:
        """Reports over one stream until the process leaves; raises when the stream breaks."""
        call.add_done_callback(lambda _: self._changed.set())
        while True:
            leaving = self._leaving
            self._changed.clear()
            lease_s = await self._send(call)
            if not self._joined:
                log.info("joined", orchestrator=self._orchestrator)
                self._joined = True
            if leaving:
                await call.done_writing()
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await call.read()
                return
            # Back within a lease: so long a restarted orchestrator waits for its members.
            self._retry_max_s = min(RETRY_MAX_S, lease_s / REPORTS_PER_LEASE)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(lease_s / REPORTS_PER_LEASE):
                    await self._changed.wait()

    def _message(self) -> control_pb2.MemberReport:
        message = member_to_proto(self.report)
        if (load := self.load()) is not None:
            loads.attach(load, message)
        return message

    async def _send(self, call: Any) -> float:
        """One report and its answer; returns the lease in seconds."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            # A stream that has ended refuses to be written to, but its read says why it ended.
            with contextlib.suppress(asyncio.InvalidStateError):
                await call.write(self._message())
            answer = await call.read()
        if not isinstance(answer, control_pb2.Assignment):
            raise errors.Unavailable("the orchestrator ended the stream")
        return answer.lease_ms / 1000


class TopologyWatcher:
    """Follows the topology; `current` is what was known last.

    Without an orchestrator address `current` stays empty. Use from one event loop only.
    """

    def __init__(self, orchestrator: str) -> None:
        self.current = Topology()
        self._orchestrator = orchestrator
        self._subscribers: list[Callable[[Topology], None]] = []
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Watches in the background until `close`."""
        if self._orchestrator and self._task is None:
            self._task = asyncio.create_task(self._run(), name="topology-watcher")

    def subscribe(self, callback: Callable[[Topology], None]) -> Callable[[], None]:
        """Calls back in the event loop after every change; returns what ends the subscription."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    async def wait_for(
        self, predicate: Callable[[Topology], bool], *, timeout_s: float, what: str
    ) -> Topology:
        """The first topology, now or later, that satisfies the predicate.

        Raises Unavailable, "`what` is not available", when there is none within the time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not predicate(self.current):
                    await self._changed.wait()
        except TimeoutError:
            raise errors.Unavailable(f"{what} is not available", retry_after_s=1.0) from None
        return self.current

    async def close(self) -> None:
        """Stops watching; `current` stays."""
        await _cancel(self._task)
        self._task = None

    async def _run(self) -> None:
        pauses, connected = _pauses(RETRY_MAX_S), True
        while True:
            try:
                async with open_channel(
                    self._orchestrator, max_message_bytes=CONTROL_BYTES
                ) as channel:
                    stub = control_pb2_grpc.OrchestratorStub(channel)
                    async for wire in stub.WatchTopology(control_pb2.WatchTopologyRequest()):
                        connected, pauses = True, _pauses(RETRY_MAX_S)
                        self._publish(self.current.merged(topology_from_proto(wire)))
                raise errors.Unavailable("the orchestrator ended the stream")
            except Exception as error:
                if connected:
                    log.warning("topology_stale", error=_describe(error))
                connected = False
            await asyncio.sleep(next(pauses))

    def _publish(self, topology: Topology) -> None:
        self.current = topology
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        for callback in tuple(self._subscribers):
            try:
                callback(topology)
            except Exception:
                # One subscriber's defect must not end the watch for all others.
                log.exception("topology_subscriber_failed")


def _pauses(longest_s: float) -> Iterator[float]:
    """Pauses that double up to a bound, each shortened by up to half so that herds disperse."""
    pause_s = min(RETRY_FIRST_S, longest_s)
    while True:
        yield pause_s * random.uniform(0.5, 1.0)
        pause_s = min(2 * pause_s, longest_s)


def _describe(error: Exception) -> str:
    if isinstance(error, grpc.RpcError):
        error = status.from_rpc_error(error)
    return str(error) or type(error).__name__


async def _cancel(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
