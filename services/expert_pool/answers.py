"""From a dispatch to its answer, on the compute thread, whichever way it came."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import structlog
import torch
from opentelemetry import trace

from chiasm import errors
from chiasm.kernels.device import is_device_lost, is_out_of_memory
from chiasm.model.experts import ExpertBank
from chiasm.services.expert_pool import wire
from chiasm.services.expert_pool.budget import Budget
from chiasm.services.expert_pool.loads import Loads
from chiasm.services.expert_pool.worker import Worker
from chiasm.telemetry import metrics, traces
from chiasm.transport.shared_memory import Arenas
from chiasm.v1 import experts_pb2

log = structlog.get_logger()


class Caller(Protocol):
    """A stream or a lane: where a dispatch came from and its answer goes."""

    @property
    def is_gone(self) -> bool:
        """True when nobody waits for answers any more."""
        ...

    @property
    def arenas(self) -> Arenas | None:
        """Where payloads lie; None when they are in the messages."""
        ...

    def answer(self, response: experts_pb2.DispatchResponse, held: int) -> None:
        """Sends an answer; called on the compute thread or where the dispatch was received.

        held: bytes to give back, by `Answers.gone`, once the answer is out or dropped.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A dispatch and where and when it came. num_bytes: of the message."""

    request: experts_pb2.DispatchRequest
    caller: Caller
    received_ns: int
    num_bytes: int


class Answers:
    """Queues dispatches and answers each of them, with partials or with an error."""

    def __init__(self, bank: ExpertBank, worker: Worker, limits: wire.DispatchLimits) -> None:
        self.is_draining = False
        self.loads = Loads(
            limits.modality, num_shards=limits.num_shards, num_experts=limits.text.num_experts
        )
        self._bank, self._worker, self._limits = bank, worker, limits
        self._budget = Budget(limits.max_queued_bytes)
        self._modality = str(limits.modality)
        self._queue_seconds = metrics.DISPATCH_QUEUE_SECONDS.labels(self._modality)
        self._compute_seconds = metrics.DISPATCH_COMPUTE_SECONDS.labels(self._modality)

    def submit(self, received: Received) -> None:
        """Queues a dispatch; when it may not be, it is refused at once. From any thread."""
        try:
            if self.is_draining:
                raise errors.Unavailable("server is draining", reason=errors.DRAINING)
            wire.check_envelope(received.request, self._limits)
            if self._worker.num_jobs >= self._limits.max_queued:
                raise errors.ResourceExhausted("dispatch queue is full", retry_after_s=0.05)
            held = received.num_bytes
            if received.caller.arenas is None:
                held += wire.max_answer_bytes(received.request, self._limits)
            self._budget.take(held)
        except errors.ChiasmError as error:
            response = experts_pb2.DispatchResponse(dispatch_id=received.request.dispatch_id)
            self._refuse(response, error)
            received.caller.answer(response, 0)
        else:
            self._worker.submit(lambda: self._run(received, held))

    def gone(self, held: int) -> None:
        """An answer is out, or dropped; from any thread."""
        self._budget.give_back(held)

    def _run(self, received: Received, held: int) -> None:
        start = time.monotonic_ns()
        queue_ns = start - received.received_ns
        # Whatever comes of it: where all come too late, the load must not look light.
        self._queue_seconds.observe(queue_ns / 1e9)
        self.loads.add_queued(queue_ns)
        if received.caller.is_gone:
            self.gone(held)
            return
        response = self._answer(received, queue_ns)
        self.loads.add_computed(time.monotonic_ns() - start)
        received.caller.answer(response, held)

    def _answer(self, received: Received, queue_ns: int) -> experts_pb2.DispatchResponse:
        request, start = received.request, time.monotonic_ns()
        response = experts_pb2.DispatchResponse(dispatch_id=request.dispatch_id, queue_ns=queue_ns)
        try:
            with self._traced(request) as span:
                if queue_ns > request.timeout_ns:
                    raise errors.DeadlineExceeded("dispatch waited past its deadline")
                with torch.inference_mode():
                    self._compute(request, received.caller, response.partials)
                response.compute_ns = time.monotonic_ns() - start
                span.set_attribute("chiasm.queue_s", queue_ns / 1e9)
                span.set_attribute("chiasm.compute_s", response.compute_ns / 1e9)
            self._compute_seconds.observe(response.compute_ns / 1e9)
        except errors.ChiasmError as error:
            self._refuse(response, error)
        except Exception as error:
            if is_device_lost(error):
                self._worker.pulse.end()  # or, failing at once, it would look like the fastest
            self._refuse(response, _typed(error, request.layer))
        return response

    def _compute(
        self, request: experts_pb2.DispatchRequest, caller: Caller, partials: experts_pb2.Partials
    ) -> None:
        """Fills `partials`, or stops half way when nobody waits for them any more."""
        arenas = caller.arenas
        args = wire.decode(request, self._limits, arenas)
        region = wire.answer_region(request, arenas)
        device = self._bank.device
        given = (args.hidden, args.expert_ids, args.expert_weights)
        hidden, ids, weights = (tensor.to(device) for tensor in given)
        spent = torch.zeros(self._limits.text.num_experts, dtype=torch.int64)
        done, start = [], time.monotonic_ns()
        # One shard at a time, way back included, so that each one's time is known.
        for partial in self._bank.partials(args.layer, args.shards, hidden, ids, weights, spent):
            partials.shards.append(wire.encode(partial, region))
            end = time.monotonic_ns()
            done.append((partial.shard, partial.rows.numel(), end - start))
            start = end
            if caller.is_gone:
                return
        for shard, num_tokens, compute_ns in done:
            self.loads.add(shard, tokens=num_tokens, compute_ns=compute_ns)
        self.loads.add_dispatch(args.shards, args.expert_ids, spent)

    def _refuse(self, response: experts_pb2.DispatchResponse, error: errors.ChiasmError) -> None:
        response.error.code, response.error.message = error.code, error.message
        metrics.DISPATCH_FAILURES.labels(self._modality, error.reason).inc()

    @contextlib.contextmanager
    def _traced(self, request: experts_pb2.DispatchRequest) -> Iterator[trace.Span]:
        """The dispatch's span; one without a caller has none."""
        if not request.traceparent:
            yield trace.INVALID_SPAN
            return
        carrier = {"traceparent": request.traceparent, "tracestate": request.tracestate}
        name = f"experts {self._modality}"
        with traces.remote_child(name, carrier, kind=traces.SERVER) as span:
            if span.is_recording():
                span.set_attributes(
                    {
                        "chiasm.modality": self._modality,
                        "chiasm.layer": request.layer,
                        "chiasm.shards": list(request.shards),
                        "chiasm.attempt": request.attempt,
                        "chiasm.tokens": request.hidden.shape[0],
                    }
                )
            yield span


def _typed(error: Exception, layer: int) -> errors.ChiasmError:
    """What an error that is none of ours is answered as; the log has all of it."""
    if is_out_of_memory(error):
        log.error("out_of_memory", layer=layer, error=str(error)[:256])
        return errors.ResourceExhausted("out of memory", retry_after_s=0.05)
    log.error("dispatch_failed", layer=layer, exc_info=error)
    if is_device_lost(error):
        return errors.Unavailable("the device is lost")  # to another server nothing is wrong
    return errors.Internal("internal error")
