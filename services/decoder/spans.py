"""The decoder's part of a request's trace.

A request has a span for its prefill and one for its decode. Below them lie engine steps with a span
per dispatch, for the first few steps of each: later ones repeat the same picture thousands of times
and stay in the sums of the spans above. A step serves many requests; its span lies in the trace of
the first one that wants the detail, and the others link to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

from opentelemetry import trace

from chiasm.services.decoder.scheduler import Chunk
from chiasm.services.decoder.sequence import Sequence, TracedPhase
from chiasm.telemetry import traces

MAX_PREFILL_STEPS, MAX_DECODE_STEPS = 4, 1
"""Steps of a request that are traced in detail, in either phase."""


def admitted(sequence: Sequence, now: int) -> None:
    """The request leaves the queue."""
    sequence.timings.admitted = now
    queued_ns = now - sequence.timings.submitted
    _start(sequence, "prefill", max_steps=MAX_PREFILL_STEPS)
    sequence.phase.span.set_attributes(
        {
            "gen_ai.latency.time_in_queue": queued_ns / 1e9,
            "gen_ai.usage.cache_read.input_tokens": sequence.num_prompt_cached,
        }
    )


def first_token(sequence: Sequence, now: int) -> None:
    """The prefill is over."""
    sequence.timings.first_token = now
    _finish(sequence)
    _start(sequence, "decode_tokens", max_steps=MAX_DECODE_STEPS)


def ended(sequence: Sequence, error: Exception | None = None) -> None:
    """The request is over; `error` tells why it did not end well."""
    span = sequence.phase.span
    span.set_attribute("gen_ai.usage.output_tokens", sequence.num_generated)
    if error is not None:
        traces.mark_failed(span, error)
    elif sequence.aborted:
        span.set_attribute(traces.CANCELLED, True)
    _finish(sequence)


@contextmanager
def step(chunks: Seq[Chunk], number: int) -> Iterator[None]:
    """Makes a step's span current if some request in it wants the detail."""
    detailed = [c.sequence.phase for c in chunks if c.sequence.phase.num_steps_left]
    if not detailed:
        yield
        return
    for phase in detailed:
        phase.num_steps_left -= 1
    first, *others = (phase.span for phase in detailed)
    attributes = {
        "chiasm.step": number,
        "chiasm.requests": len(chunks),
        "chiasm.tokens": sum(c.num_tokens for c in chunks),
    }
    context = trace.set_span_in_context(first)
    with traces.span("engine_step", context=context, attributes=attributes) as span:
        for other in others:
            other.add_link(span.get_span_context())
        yield


def _start(sequence: Sequence, name: str, *, max_steps: int) -> None:
    """Begins a phase; nothing is traced for a request whose caller is not."""
    context = sequence.trace_context
    if trace.get_current_span(context).get_span_context().trace_flags.sampled:
        sequence.phase = TracedPhase(
            span=traces.tracer.start_span(name, context=context),
            num_steps_left=max_steps,
            expert_wait=dict(sequence.timings.expert_wait),
        )


def _finish(sequence: Sequence) -> None:
    phase, sequence.phase = sequence.phase, TracedPhase()
    for modality, waited_ns in sequence.timings.expert_wait.items():
        wait_s = (waited_ns - phase.expert_wait[modality]) / 1e9
        phase.span.set_attribute(f"chiasm.{modality}_expert_wait_s", wait_s)
    phase.span.end()
