"""ExpertPool over gRPC: decode, compute, encode."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import structlog
import torch
from opentelemetry import trace

from chiasm import errors
from chiasm.services.expert_pool import wire
from chiasm.services.expert_pool.engine import ExpertEngine, Timed
from chiasm.telemetry import metrics, traces
from chiasm.transport.enums import WIRE_MODALITIES
from chiasm.types import shard_experts
from chiasm.v1 import experts_pb2, experts_pb2_grpc

MAX_STREAM_DISPATCHES = 64
"""Dispatches of one stream in hand at once; beyond it the stream is read no further."""

_Answers = asyncio.Queue[experts_pb2.DispatchResponse | None]
"""Answers of one stream on their way out; None ends the stream."""

log = structlog.get_logger()


Context = grpc.aio.ServicerContext[Any, Any]


class ExpertPoolServicer(experts_pb2_grpc.ExpertPoolServicer):
    """`on_change` is called whenever the set of loaded shards or the drain state changes."""

    def __init__(
        self, engine: ExpertEngine, limits: wire.DispatchLimits, on_change: Callable[[], None]
    ) -> None:
        self._engine, self._limits, self._on_change = engine, limits, on_change
        self._modality = str(limits.modality)
        queued = metrics.QUEUED_DISPATCHES.labels(self._modality)
        queued.set_function(lambda: self._engine.queued)
        self._assigning: set[asyncio.Task[None]] = set()
        self._streams: set[_Answers] = set()
        self.draining = False

    async def Dispatch(
        self,
        requests: AsyncIterator[experts_pb2.DispatchRequest],
        context: Context,
    ) -> AsyncIterator[experts_pb2.DispatchResponse]:
        answers: _Answers = asyncio.Queue()
        slots = asyncio.Semaphore(MAX_STREAM_DISPATCHES)
        running: set[asyncio.Task[None]] = set()

        async def answer(request: experts_pb2.DispatchRequest) -> None:
            try:
                answers.put_nowait(await self._answer(request))
            finally:
                slots.release()

        async def read() -> None:
            try:
                async for request in requests:
                    await slots.acquire()
                    task = asyncio.create_task(answer(request))
                    running.add(task)
                    task.add_done_callback(running.discard)
                await asyncio.gather(*running)
            finally:
                answers.put_nowait(None)

        reader = asyncio.create_task(read())
        self._streams.add(answers)
        try:
            while (response := await answers.get()) is not None:
                yield response
            if not self.draining:
                await reader  # what ended the stream, if it was not its end
        finally:
            self._streams.discard(answers)
            for task in (reader, *running):
                task.cancel()
            await asyncio.gather(reader, *running, return_exceptions=True)

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
            precision=str(bank.dtype).removeprefix("torch."),
            queued_dispatches=self._engine.queued,
            weight_bytes=bank.weight_bytes,
            draining=self.draining,
        )

    async def Assign(
        self, request: experts_pb2.AssignRequest, context: Context
    ) -> experts_pb2.PoolDescription:
        if any(shard >= self._limits.num_shards for shard in request.shards):
            raise errors.InvalidArgument("shards", f"must lie below {self._limits.num_shards}")
        if request.epoch < self._engine.epoch:
            raise errors.FailedPrecondition(
                f"epoch {request.epoch} is older than {self._engine.epoch}", reason="STALE_EPOCH"
            )
        task = asyncio.create_task(
            self._engine.assign(
                list(request.shards), epoch=request.epoch, on_change=self._on_change
            )
        )
        self._assigning.add(task)
        task.add_done_callback(self._assigned)
        await asyncio.sleep(0)  # the assignment takes effect before it is described
        return await self.Describe(experts_pb2.DescribeRequest(), context)

    async def Drain(
        self, request: experts_pb2.DrainRequest, context: Context
    ) -> experts_pb2.PoolDescription:
        self.draining = True
        self._on_change()
        return await self.Describe(experts_pb2.DescribeRequest(), context)

    async def drain(self) -> None:
        """Refuses new dispatches, waits for those accepted before and ends all streams.

        A peer that has not heard of the end of this server would keep its stream open.
        """
        self.draining = True
        await self._engine.wait_idle()
        for answers in self._streams:
            answers.put_nowait(None)

    def _assigned(self, task: asyncio.Task[None]) -> None:
        self._assigning.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("assign_failed", error=str(error)[:256])

    async def _answer(self, request: experts_pb2.DispatchRequest) -> experts_pb2.DispatchResponse:
        response = experts_pb2.DispatchResponse(dispatch_id=request.dispatch_id)
        try:
            with self._traced(request) as span:
                timed = await self._run(request)
                span.set_attribute("chiasm.queue_s", timed.queue_ns / 1e9)
                span.set_attribute("chiasm.compute_s", timed.compute_ns / 1e9)
            response.partials.CopyFrom(timed.value)
            response.queue_ns, response.compute_ns = timed.queue_ns, timed.compute_ns
            metrics.DISPATCH_QUEUE_SECONDS.labels(self._modality).observe(timed.queue_ns / 1e9)
            metrics.DISPATCH_COMPUTE_SECONDS.labels(self._modality).observe(timed.compute_ns / 1e9)
        except errors.ChiasmError as error:
            self._refuse(response, error)
        except Exception:
            log.exception("dispatch_failed", layer=request.layer)
            self._refuse(response, errors.Internal("internal error"))
        return response

    @contextlib.contextmanager
    def _traced(self, request: experts_pb2.DispatchRequest) -> Iterator[trace.Span]:
        """The dispatch's span, from receipt to answer; one without a caller has none."""
        carrier = {"traceparent": request.traceparent, "tracestate": request.tracestate}
        name = f"experts {self._modality}"
        with traces.remote_child(name, carrier, kind=traces.SERVER) as span:
            span.set_attributes(
                {
                    "chiasm.modality": self._modality,
                    "chiasm.layer": request.layer,
                    "chiasm.shards": list(request.shards),
                    "chiasm.attempt": request.attempt,
                }
            )
            if request.hidden.shape:
                span.set_attribute("chiasm.tokens", request.hidden.shape[0])
            yield span

    async def _run(self, request: experts_pb2.DispatchRequest) -> Timed[experts_pb2.Partials]:
        if self.draining:
            raise errors.Unavailable("server is draining", reason="DRAINING")
        wire.check_envelope(request, self._limits)
        return await self._engine.run(lambda: self._compute(request), timeout_ns=request.timeout_ns)

    def _refuse(self, response: experts_pb2.DispatchResponse, error: errors.ChiasmError) -> None:
        response.error.code, response.error.message = error.code, error.message
        metrics.DISPATCH_FAILURES.labels(self._modality, error.reason).inc()

    def _compute(self, request: experts_pb2.DispatchRequest) -> experts_pb2.Partials:
        """Runs on the compute thread."""
        args = wire.decode(request, self._limits)
        device = self._engine.bank.device
        partials = self._engine.bank.partials(
            args.layer,
            args.shards,
            args.hidden.to(device),
            args.expert_ids.to(device),
            args.expert_weights.to(device),
        )
        self._count(args)
        return wire.encode(partials)

    def _count(self, args: wire.DispatchArguments) -> None:
        metrics.DISPATCH_TOKENS.labels(self._modality).inc(args.hidden.shape[0])
        counts = torch.bincount(
            args.expert_ids.flatten().long(), minlength=self._limits.text.num_experts
        ).tolist()
        for shard in args.shards:
            for expert in shard_experts(
                shard, self._limits.num_shards, self._limits.text.num_experts
            ):
                if counts[expert]:
                    metrics.EXPERT_TOKENS.labels(self._modality, str(expert)).inc(counts[expert])
