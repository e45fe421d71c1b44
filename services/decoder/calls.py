"""One message to one server, from when it is sent to its answer or failure."""

from __future__ import annotations

import time
from typing import Protocol

from chiasm import errors
from chiasm.services.decoder.work import Part, Work
from chiasm.telemetry import traces
from chiasm.transport.shared_memory import Arena, Region
from chiasm.v1 import experts_pb2


class Owner(Protocol):
    """Whoever waits for a call; told on the engine's thread, once."""

    def answered(
        self, call: Call, response: experts_pb2.DispatchResponse, arena: Arena | None
    ) -> None:
        """The server has answered, with partials or with an error."""
        ...

    def failed(self, call: Call, error: errors.ChiasmError) -> None:
        """There will be no answer."""
        ...


class Call:
    """Made when it is sent. `dispatch_id` is the connection's, which sets it."""

    def __init__(
        self,
        owner: Owner,
        work: Work,
        part: Part,
        address: str,
        *,
        attempt: int,
        timeout_s: float,
        hedge_delay_s: float,
        is_hedge: bool,
    ) -> None:
        self.owner, self.work, self.part, self.address = owner, work, part, address
        self.attempt, self.is_hedge, self.timeout_s = attempt, is_hedge, timeout_s
        self.sent = time.monotonic()
        self.deadline = self.sent + timeout_s
        self.late_at = self.hedge_at = self.sent + hedge_delay_s
        self.dispatch_id = 0
        self.request_bytes = work.request_bytes(part)
        self.answer_bytes = work.answer_bytes(part)
        self._span = traces.begin_child(
            f"dispatch {work.modality}",
            kind=traces.CLIENT,
            attributes={
                **traces.peer(address),
                "chiasm.modality": str(work.modality),
                "chiasm.layer": work.layer,
                "chiasm.shards": part.shards,
                "chiasm.attempt": attempt,
                "chiasm.hedge": is_hedge,
            },
        )

    def request(self, region: Region | None = None) -> experts_pb2.DispatchRequest:
        """The whole message, payloads in it or in `region`."""
        request = self.work.request(self.part, region)
        request.dispatch_id, request.attempt = self.dispatch_id, self.attempt
        request.timeout_ns = int(self.timeout_s * 1e9)
        if self._span.get_span_context().is_valid:
            context = traces.inject(self._span)
            request.traceparent = context.get("traceparent", "")
            request.tracestate = context.get("tracestate", "")
        return request

    def end(self, error: errors.ChiasmError | None = None) -> None:
        """Ends the span."""
        if error is not None:
            traces.mark_failed(self._span, error)
        self._span.end()
