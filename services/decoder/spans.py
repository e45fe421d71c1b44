"""The decoder's part of a request's trace.

A request has a span for its prefill and one for its decode. Below them lie engine steps with a span
per dispatch, for every step of the prefill and the first of the decode: later steps repeat the same
picture thousands of times and stay in the decode span's sums. A step serves many requests; its span
lies in the first traced one and the others link to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

from opentelemetry import trace

from chiasm.services.decoder.scheduler import Chunk
from chiasm.services.decoder.sequence import Sequence
from chiasm.telemetry.traces import tracer
from chiasm.types import Modality


def admitted(sequence: Sequence, now: int) -> None:
    """The request leaves the queue."""
    sequence.timings.admitted = now
    queued_ns = now - sequence.timings.submitted
    _start(sequence, "prefill", {"gen_ai.latency.time_in_queue": queued_ns / 1e9})


def first_token(sequence: Sequence, now: int) -> None:
    """The prefill is over."""
    sequence.timings.first_token = now
    _finish(sequence)
    _start(sequence, "decode_tokens", {})


def ended(sequence: Sequence) -> None:
    """The request is over, well or not."""
    sequence.span.set_attribute("gen_ai.usage.output_tokens", sequence.num_generated)
    _finish(sequence)


@contextmanager
def step(chunks: Seq[Chunk], number: int) -> Iterator[None]:
    """Makes a step's span current if some request in it wants the detail."""
    detailed = [
        c.sequence
        for c in chunks
        if c.sequence.num_generated <= 1 and c.sequence.span.is_recording()
    ]
    if not detailed:
        yield
        return
    first, *others = (s.span for s in detailed)
    with (
        trace.use_span(first, end_on_exit=False),
        tracer.start_as_current_span("engine_step") as span,
    ):
        span.set_attributes(
            {
                "chiasm.step": number,
                "chiasm.requests": len(chunks),
                "chiasm.tokens": sum(c.num_tokens for c in chunks),
            }
        )
        for other in others:
            other.add_link(span.get_span_context())
        yield


def _start(sequence: Sequence, name: str, attributes: dict[str, float]) -> None:
    parent = trace.get_current_span(sequence.trace_context)
    if parent.is_recording():
        sequence.span = tracer.start_span(
            name, context=sequence.trace_context, attributes=attributes
        )


def _finish(sequence: Sequence) -> None:
    for modality in Modality:
        wait_s = sequence.timings.expert_wait[modality] / 1e9
        sequence.span.set_attribute(f"chiasm.{modality}_expert_wait_s", wait_s)
    sequence.span.end()
    sequence.span = trace.INVALID_SPAN
