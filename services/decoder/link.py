"""The way to one expert server: kept open, and opened again when it breaks.

A connection is one life of it: a stream, and where both share a host a lane beside it. Connections
are made in the event loop and used on the engine's thread; streams live in the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial

import grpc
import structlog

from chiasm import errors
from chiasm.services.decoder.calls import Call
from chiasm.services.decoder.inbox import Inbox
from chiasm.services.decoder.lane import Lane, open_lane
from chiasm.services.decoder.pace import Pace
from chiasm.telemetry import metrics
from chiasm.transport import status
from chiasm.transport.channel import open_channel
from chiasm.transport.shared_memory import Arena
from chiasm.types import Modality
from chiasm.v1 import experts_pb2, experts_pb2_grpc

PROBE_TIMEOUT_S = 1.0
"""A server that has not answered a probe for this long is still away."""

PROBE_PAUSE_S = 0.1
"""Pause between two probes, and before a broken connection is made anew."""

MAX_DAMAGED = 3
"""After so many answers in a row that fail their checks a server is away."""

MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 30.0
"""For so long, at least: others' requests must not wait for it. Nor must they for a server that is
silent again and again without having answered a dispatch: its pause doubles each time."""

ITERATOR_END_S = 1.0
"""Bound of the wait for a stream's requests to end."""

log = structlog.get_logger()


class NoAnswer(errors.DeadlineExceeded):
    """The server has said nothing, not even that it is too busy."""


class Connection:
    """One life of the way to a server. For the engine's thread.

    on_lost: called once, on the engine's thread, when the engine finds it broken.
    """

    def __init__(
        self,
        address: str,
        inbox: Inbox,
        send: Callable[[experts_pb2.DispatchRequest], None],
        on_lost: Callable[[errors.ChiasmError], None],
        modality: Modality,
        pace: Pace,
    ) -> None:
        self.address, self.pace = address, pace
        self.is_broken = self.has_answered = False
        self._inbox, self._send, self._on_lost = inbox, send, on_lost
        self._calls: dict[int, Call] = {}  # oldest first
        self._lane: Lane | None = None
        self._next_id = 0
        self._num_damaged = 0
        self._sent = {
            way: metrics.DISPATCHES_SENT.labels(str(modality), way) for way in ("lane", "stream")
        }

    @property
    def num_calls(self) -> int:
        """Calls under way, those that nobody waits for any more included."""
        return len(self._calls)

    def oldest(self) -> Call | None:
        """The call that has been under way for longest."""
        return next(iter(self._calls.values()), None)

    def send(self, call: Call) -> None:
        """Sends a call; its owner hears of the answer, or of the failure, from `Inbox.wait`.

        Raises Unavailable when the connection is broken.
        """
        if self.is_broken:
            raise errors.Unavailable(f"{self.address} is away")
        call.dispatch_id = self._next_id = self._next_id + 1
        broken = None
        try:
            is_on_lane = self._lane is not None and self._lane.send(call)
        except errors.Unavailable as error:
            # Another one: whoever keeps this one keeps the lane, mapped, in its traceback.
            broken = errors.Unavailable(f"{self.address}: {error.message}")
        if broken is not None:
            self.lose(broken)
            raise broken
        if not is_on_lane:
            self._send(call.request())
        self._calls[call.dispatch_id] = call
        self._sent["lane" if is_on_lane else "stream"].inc()

    def answered(self, response: experts_pb2.DispatchResponse, arena: Arena | None = None) -> None:
        """An answer has come, on either way."""
        self.has_answered = True
        if call := self._calls.pop(response.dispatch_id, None):
            call.owner.answered(call, response, arena)

    def damaged(self, error: errors.DataLoss | None) -> None:
        """Books whether an answer failed its checks; too many in a row end the connection."""
        self._num_damaged = self._num_damaged + 1 if error is not None else 0
        if error is not None and self._num_damaged >= MAX_DAMAGED:
            self.lose(error)

    def use_lane(self, opened: Lane) -> None:
        """From now on calls go over the lane."""
        if self.is_broken:
            opened.close()
            return
        self._lane = opened
        self._inbox.watch(opened.descriptor, self._receive)

    def lose(self, error: errors.ChiasmError) -> None:
        """The engine has found the server gone, stuck or not fit for use."""
        if not self.is_broken:
            self.fail(error)
            self._on_lost(error)

    def fail(self, error: errors.ChiasmError) -> None:
        """Ends the connection; calls under way fail."""
        self.is_broken = True
        if self._lane is not None:
            self._inbox.unwatch(self._lane.descriptor)
            self._lane.close()
            self._lane = None
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.owner.failed(call, error)

    def _receive(self) -> None:
        if self._lane is not None:
            try:
                self._lane.receive(self.answered)
            except errors.Unavailable as error:
                self.lose(errors.Unavailable(f"{self.address}: {error.message}"))


class ServerLink:
    """Keeps a connection to one server; for the event loop.

    `connection` is None while the server is away; `on_change` is called whenever that changes.
    """

    def __init__(
        self,
        address: str,
        modality: Modality,
        inbox: Inbox,
        *,
        max_message_bytes: int,
        use_lane: bool,
        on_change: Callable[[], None],
    ) -> None:
        self.address = address
        self.connection: Connection | None = None
        self._modality, self._inbox, self._on_change = modality, inbox, on_change
        self._max_message_bytes, self._use_lane = max_message_bytes, use_lane
        self._pace = Pace()  # of the server, however often the way to it breaks
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run(), name=f"link {address}")

    async def close(self) -> None:
        """Ends the link; calls in flight fail with Unavailable."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        pause_s = 0.0
        while True:
            async with open_channel(
                self.address, max_message_bytes=self._max_message_bytes
            ) as channel:
                stub = experts_pb2_grpc.ExpertPoolStub(channel)
                description = await self._probe(stub)
                connection, error = await self._live(stub, description)
            log.warning("expert_server_away", modality=self._modality, address=self.address)
            pause_s = next_pause_s(pause_s, error, has_answered=connection.has_answered)
            await asyncio.sleep(pause_s)

    async def _probe(self, stub: experts_pb2_grpc.ExpertPoolStub) -> experts_pb2.PoolDescription:
        """Returns when the server answers, and takes work."""
        while True:
            with contextlib.suppress(grpc.RpcError, errors.DataLoss):
                description: experts_pb2.PoolDescription = status.parsed(
                    await stub.Describe(experts_pb2.DescribeRequest(), timeout=PROBE_TIMEOUT_S),
                    self.address,
                )
                if not description.draining:
                    return description
            await asyncio.sleep(PROBE_PAUSE_S)

    async def _live(
        self, stub: experts_pb2_grpc.ExpertPoolStub, description: experts_pb2.PoolDescription
    ) -> tuple[Connection, errors.ChiasmError]:
        """Offers a connection until it breaks; returns it and why it did."""
        outgoing: asyncio.Queue[experts_pb2.DispatchRequest | None] = asyncio.Queue()
        sent = asyncio.Event()
        lost: asyncio.Future[errors.ChiasmError] = self._loop.create_future()
        connection = Connection(
            self.address,
            self._inbox,
            lambda request: self._tell(outgoing.put_nowait, request),
            lambda error: self._tell(_resolve, lost, error),
            self._modality,
            self._pace,
        )
        call = stub.Dispatch(_iterate(outgoing, sent))
        tasks = (
            asyncio.create_task(self._read(call, connection, lost)),
            asyncio.create_task(self._open_lane(description, connection)),
        )
        log.info("expert_server_up", modality=self._modality, address=self.address)
        self.connection = connection
        self._on_change()
        error: errors.ChiasmError = errors.Unavailable(f"the link to {self.address} is closed")
        try:
            error = await lost
        finally:
            self.connection = None
            self._on_change()
            self._inbox.post(lambda: connection.fail(error))
            outgoing.put_nowait(None)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(TimeoutError):  # a stream that never began has nothing to end
                async with asyncio.timeout(ITERATOR_END_S):
                    await sent.wait()
        return connection, error

    def _tell(self, what: Callable[..., None], *about: object) -> None:
        """Has something done in the event loop; from the engine's thread."""
        self._loop.call_soon_threadsafe(what, *about)

    async def _read(
        self,
        call: grpc.aio.StreamStreamCall[experts_pb2.DispatchRequest, experts_pb2.DispatchResponse],
        connection: Connection,
        lost: asyncio.Future[errors.ChiasmError],
    ) -> None:
        """Hands answers over until the stream ends."""
        error = errors.Unavailable(f"{self.address} ended the stream")
        try:
            async for response in call:
                answer = status.parsed(response, self.address)
                self._inbox.post(partial(connection.answered, answer))
        # Whatever ended the stream, the dispatches on it can be repeated.
        except grpc.RpcError as failure:
            error = errors.Unavailable(f"{self.address}: {failure.details()}")
        except errors.DataLoss as failure:
            error = errors.Unavailable(failure.message)
        _resolve(lost, error)

    async def _open_lane(
        self, description: experts_pb2.PoolDescription, connection: Connection
    ) -> None:
        """Opens a lane where there can be one; otherwise the stream does."""
        if not self._use_lane:
            return
        outcome = "opened"
        if not description.HasField("lane"):
            outcome = "not_offered"
        else:
            try:
                opened = await open_lane(description.lane, slot_bytes=self._max_message_bytes)
                self._inbox.post(lambda: connection.use_lane(opened))
            except errors.Unavailable as error:
                outcome = "not_possible"
                log.info("no_lane", address=self.address, detail=error.message)
        metrics.LANES.labels(str(self._modality), outcome).inc()


def next_pause_s(last_s: float, error: errors.ChiasmError, *, has_answered: bool) -> float:
    """How long to leave a server alone whose connection ended with `error`, after a dispatch on it
    was answered or not; last_s: the pause before it."""
    if isinstance(error, NoAnswer) and not has_answered:
        return min(max(2 * last_s, MIN_PAUSE_S), MAX_PAUSE_S)
    return MIN_PAUSE_S if isinstance(error, errors.DataLoss) else PROBE_PAUSE_S


async def _iterate(
    outgoing: asyncio.Queue[experts_pb2.DispatchRequest | None], sent: asyncio.Event
) -> AsyncIterator[experts_pb2.DispatchRequest]:
    # To its end: grpc does not let go of an iterator that still waits.
    try:
        while (request := await outgoing.get()) is not None:
            yield request
    finally:
        sent.set()


def _resolve(future: asyncio.Future[errors.ChiasmError], error: errors.ChiasmError) -> None:
    if not future.done():
        future.set_result(error)
