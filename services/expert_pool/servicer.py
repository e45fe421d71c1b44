"""ExpertPool over gRPC: streams of dispatches, and what an operator asks for."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import structlog

from chiasm import errors
from chiasm.load import ExpertLoad
from chiasm.services.expert_pool import wire
from chiasm.services.expert_pool.answers import Answers, Received
from chiasm.services.expert_pool.engine import ExpertEngine
from chiasm.services.expert_pool.lanes import LaneServer
from chiasm.telemetry import metrics
from chiasm.transport import lane
from chiasm.transport.enums import WIRE_MODALITIES
from chiasm.transport.messages import MAX_EPOCH, answer_bytes
from chiasm.transport.shared_memory import Arenas
from chiasm.v1 import experts_pb2, experts_pb2_grpc

MAX_STREAMS = 256
"""Streams open at once, one for each decoder; each may have a message half received."""

MAX_STREAM_DISPATCHES = 64
"""Dispatches of one stream in hand at once; beyond it the stream is read no further."""

LANE_SLOTS = 8
"""Largest dispatches that an arena may hold."""

log = structlog.get_logger()


_Outgoing = tuple[experts_pb2.DispatchResponse, int]
"""An answer and the bytes held for its dispatch."""

Context = grpc.aio.ServicerContext[Any, Any]


class ExpertPoolServicer(experts_pb2_grpc.ExpertPoolServicer):
    """Takes up to `max_assigned` shards; `on_change` is called whenever the set of loaded shards or
    the drain state changes."""

    def __init__(
        self,
        engine: ExpertEngine,
        limits: wire.DispatchLimits,
        *,
        max_assigned: int,
        on_change: Callable[[], None],
    ) -> None:
        self._max_assigned = max_assigned
        self._engine, self._limits, self._on_change = engine, limits, on_change
        self._answers = Answers(engine.bank, engine.worker, limits)
        self._lanes = (
            LaneServer(engine.worker, self._answers, max_arena_bytes=_arena_bytes(limits))
            if lane.is_supported()
            else None
        )
        engine.worker.start()
        metrics.QUEUED_DISPATCHES.labels(str(limits.modality)).set_function(
            lambda: engine.worker.num_jobs
        )
        self._assigning: set[asyncio.Task[None]] = set()
        self._streams: set[_Stream] = set()
        self._is_ending = False
        self._lease: asyncio.TimerHandle | None = None

    @property
    def draining(self) -> bool:
        """Whether new dispatches are refused: after Drain, for as long as it holds."""
        return self._answers.is_draining

    async def Dispatch(
        self,
        requests: AsyncIterator[experts_pb2.DispatchRequest],
        context: Context,
    ) -> AsyncIterator[experts_pb2.DispatchResponse]:
        if self.draining:  # nobody would end the stream, whose dispatches are all refused
            raise errors.Unavailable("server is draining", reason="DRAINING")
        if len(self._streams) >= MAX_STREAMS:
            raise errors.ResourceExhausted("too many streams are open", retry_after_s=1.0)
        stream = _Stream(self._answers)
        reader = asyncio.create_task(stream.read(requests))
        self._streams.add(stream)
        try:
            while (answer := await stream.outgoing.get()) is not None:
                response, held = answer
                try:
                    yield response
                finally:
                    stream.written(held)
            if not self.draining:
                await reader  # what ended the stream, if it was not its end
        finally:
            stream.close()
            self._streams.discard(stream)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def Describe(
        self, request: experts_pb2.DescribeRequest, context: Context
    ) -> experts_pb2.PoolDescription:
        bank = self._engine.bank
        return experts_pb2.PoolDescription(
            modality=WIRE_MODALITIES[bank.modality],
            num_shards=bank.num_shards,
            loaded_shards=bank.shards,
            loading_shards=self._engine.loading,
            epoch=self._engine.epoch,
            precision=bank.precision,
            queued_dispatches=self._engine.worker.num_jobs,
            weight_bytes=bank.weight_bytes,
            draining=self.draining,
            lane=self._lanes.offer if self._lanes is not None else None,
            shard_loads=self._answers.loads.to_proto(),
        )

    async def Assign(
        self, request: experts_pb2.AssignRequest, context: Context
    ) -> experts_pb2.PoolDescription:
        if len(request.shards) > self._max_assigned:
            raise errors.InvalidArgument("shards", f"are more than {self._max_assigned}")
        if any(shard >= self._limits.num_shards for shard in request.shards):
            raise errors.InvalidArgument("shards", f"must lie below {self._limits.num_shards}")
        if request.epoch > MAX_EPOCH:
            raise errors.InvalidArgument("epoch", f"must be at most {MAX_EPOCH}")
        if not self._engine.may_assign(request.shards, request.epoch):
            raise errors.FailedPrecondition(
                f"epoch {request.epoch} is not newer than {self._engine.epoch}, in which other "
                "shards were assigned",
                reason="STALE_EPOCH",
            )
        task = asyncio.create_task(
            self._engine.assign(
                list(request.shards), epoch=request.epoch, on_change=self._on_change
            )
        )
        self._assigning.add(task)
        task.add_done_callback(self._assigned)
        return await self.Describe(experts_pb2.DescribeRequest(), context)

    async def Drain(
        self, request: experts_pb2.DrainRequest, context: Context
    ) -> experts_pb2.PoolDescription:
        if not self._is_ending:
            self._set_draining(True)
            self._end_lease()
            if request.lease_ms:
                self._lease = asyncio.get_running_loop().call_later(
                    request.lease_ms / 1000, self._set_draining, False
                )
        return await self.Describe(experts_pb2.DescribeRequest(), context)

    def load(self) -> ExpertLoad:
        """How busy the server is."""
        return self._answers.loads.report(queued=self._engine.worker.num_jobs)

    async def drain(self) -> None:
        """Refuses new dispatches, waits for those accepted before and ends all streams and lanes.

        A peer that has not heard of the end of this server would keep its stream open.
        """
        self._is_ending = self._answers.is_draining = True
        self._end_lease()
        await self._engine.settled()
        if self._lanes is not None:
            self._engine.worker.submit(self._lanes.close)
            await self._engine.settled()
        for stream in self._streams:
            stream.outgoing.put_nowait(None)

    def _set_draining(self, is_draining: bool) -> None:
        if is_draining != self._answers.is_draining:
            log.info("draining" if is_draining else "taking_work_again")
            self._answers.is_draining = is_draining
            self._on_change()

    def _end_lease(self) -> None:
        if self._lease is not None:
            self._lease.cancel()
            self._lease = None

    def _assigned(self, task: asyncio.Task[None]) -> None:
        self._assigning.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("assign_failed", error=str(error)[:256])


class _Stream:
    """One Dispatch stream; a Caller. Used in the event loop, but for `answer`."""

    def __init__(self, answers: Answers) -> None:
        self.is_gone = False
        self.arenas: Arenas | None = None
        self.outgoing: asyncio.Queue[_Outgoing | None] = asyncio.Queue()
        self._answers = answers
        self._in_hand = asyncio.Semaphore(MAX_STREAM_DISPATCHES)
        self._loop = asyncio.get_running_loop()

    async def read(self, requests: AsyncIterator[experts_pb2.DispatchRequest]) -> None:
        """Queues dispatches; returns when the peer has closed its side and all are answered."""
        try:
            async for request in requests:
                await self._in_hand.acquire()
                self._answers.submit(
                    Received(
                        request=request,
                        caller=self,
                        received_ns=time.monotonic_ns(),
                        num_bytes=request.ByteSize(),
                    )
                )
            for _ in range(MAX_STREAM_DISPATCHES):
                await self._in_hand.acquire()
        finally:
            self.outgoing.put_nowait(None)

    def answer(self, response: experts_pb2.DispatchResponse, held: int) -> None:
        """Sends an answer; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the stream
            self._loop.call_soon_threadsafe(self._put, (response, held))

    def written(self, held: int) -> None:
        """An answer is out, and no longer in hand: a peer that does not read is read no further."""
        self._in_hand.release()
        self._answers.gone(held)

    def close(self) -> None:
        """Drops what is not written, and what is still to be answered."""
        self.is_gone = True
        while not self.outgoing.empty():
            if (answer := self.outgoing.get_nowait()) is not None:
                self._put(answer)

    def _put(self, answer: _Outgoing) -> None:
        if self.is_gone:
            self._answers.gone(answer[1])
        else:
            self.outgoing.put_nowait(answer)


def _arena_bytes(limits: wire.DispatchLimits) -> int:
    text = limits.text
    return LANE_SLOTS * answer_bytes(limits.max_tokens, text.hidden_size, text.moe_k)
