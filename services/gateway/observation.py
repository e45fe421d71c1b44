"""What is recorded of one Generate call: its line in ledger and log, its latencies and its span.

The ledger balances: accepted = finished + failed + in flight.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType

import structlog
from opentelemetry import context as otel_context
from opentelemetry import trace

from chiasm import errors
from chiasm.services.gateway.deadline import Deadline
from chiasm.services.gateway.domain import Generation, Grammar, Usage
from chiasm.telemetry import metrics, traces

_CLOCK_SLACK_S = 0.05
_INT64_MAX = 2**63 - 1
log = structlog.get_logger()


class Observation:
    """Entered when a call arrives, left when it ends; `context` is the parent of its spans."""

    def __init__(self, *, operation: str, model: str, deadline: Deadline) -> None:
        self._deadline = deadline
        self.start_ns = time.monotonic_ns()
        self._span = traces.tracer.start_span(
            f"{operation} {model}",
            kind=traces.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "chiasm",
                "gen_ai.request.model": model,
                "gen_ai.request.stream": True,
                "gen_ai.response.model": model,
            },
        )
        self.context: otel_context.Context = trace.set_span_in_context(self._span)
        self._first_token_ns = 0
        self._last_token_s: dict[int, float] = {}  # by answer
        self._num_tokens = self._num_cached = 0
        self._usage: Usage | None = None
        self._finish_reason = ""

    def __enter__(self) -> Observation:
        metrics.REQUESTS_ACCEPTED.inc()
        metrics.REQUESTS_IN_FLIGHT.inc()
        self._token = otel_context.attach(self.context)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        metrics.REQUESTS_IN_FLIGHT.dec()
        if self._finish_reason:
            metrics.REQUESTS_FINISHED.labels(self._finish_reason).inc()
            metrics.E2E_REQUEST_SECONDS.observe(self.elapsed_ns() / 1e9)
            self._log("request_finished", self._finish_reason)
        else:
            reason = self._failure(error)
            metrics.REQUESTS_FAILED.labels(reason).inc()
            self._span.set_attribute("error.type", reason)
            self._span.set_status(trace.StatusCode.ERROR, str(error)[: traces.MAX_MESSAGE_CHARS])
            self._log("request_failed", reason)
        otel_context.detach(self._token)
        self._span.end()

    def elapsed_ns(self) -> int:
        """Nanoseconds since the call arrived."""
        return time.monotonic_ns() - self.start_ns

    def validated(self, generation: Generation) -> None:
        """Records what was asked for."""
        sampling = generation.sampling
        self._span.set_attributes(
            {
                "gen_ai.response.id": generation.request_id,
                "gen_ai.request.max_tokens": sampling.max_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.top_k": sampling.top_k,
                "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
                "gen_ai.request.presence_penalty": sampling.presence_penalty,
                "gen_ai.request.choice.count": sampling.num_choices,
                "gen_ai.output.type": _output_type(sampling.grammar),
            }
        )
        if num_received := sum(map(len, generation.received)):
            self._span.set_attribute("chiasm.received_tokens", num_received)
        if sampling.stop:
            self._span.set_attribute("gen_ai.request.stop_sequences", sampling.stop)
        if sampling.seed is not None and sampling.seed <= _INT64_MAX:
            self._span.set_attribute("gen_ai.request.seed", sampling.seed)

    def laid_out(self, usage: Usage) -> None:
        """Records the prompt's tokens."""
        self._usage = usage
        for modality, num_tokens in usage.by_modality.items():
            metrics.PROMPT_TOKENS.labels(modality).inc(num_tokens)
            self._span.set_attribute(f"gen_ai.usage.{modality}.input_tokens", num_tokens)
        self._span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)

    def encoded(self, encode_ns: int) -> None:
        """Records the wait for the vision encoder."""
        metrics.ENCODE_WAIT_SECONDS.observe(encode_ns / 1e9)

    def generated(self, index: int, num_tokens: int) -> None:
        """Records tokens of answer `index` that are about to be streamed."""
        now_s, last_s = time.monotonic(), self._last_token_s.get(index)
        if not self._last_token_s:
            self._first_token_ns = self.elapsed_ns()
            metrics.TIME_TO_FIRST_TOKEN_SECONDS.observe(self._first_token_ns / 1e9)
            self._span.set_attribute(
                "gen_ai.response.time_to_first_chunk", self._first_token_ns / 1e9
            )
        elif last_s is not None:
            for _ in range(num_tokens):
                metrics.INTER_TOKEN_SECONDS.observe((now_s - last_s) / num_tokens)
        self._last_token_s[index] = now_s
        self._num_tokens += num_tokens
        metrics.COMPLETION_TOKENS.inc(num_tokens)

    def finished(self, reason: str, num_tokens: int, *, num_cached: int) -> None:
        """Records that the call ended well; what happens to the last message no longer counts."""
        self._finish_reason, self._num_cached = reason, num_cached
        self._num_tokens = num_tokens  # with those of gateways before this one
        metrics.CACHED_PROMPT_TOKENS.inc(num_cached)
        self._span.set_attributes(
            {
                "gen_ai.response.finish_reasons": [reason],
                "gen_ai.usage.output_tokens": num_tokens,
                "gen_ai.usage.cache_read.input_tokens": num_cached,
            }
        )

    def _log(self, event: str, reason: str) -> None:
        """The call's line, with what is known by now."""
        known: dict[str, object] = {}
        if self._usage is not None:
            known["prompt_tokens"] = self._usage.by_modality
        if self._finish_reason:
            known["cached_tokens"] = self._num_cached
        if self._first_token_ns:
            known["completion_tokens"] = self._num_tokens
            known["first_token_ms"] = round(self._first_token_ns / 1e6, 3)
        log.info(event, reason=reason, **known, total_ms=round(self.elapsed_ns() / 1e6, 3))

    def _failure(self, error: BaseException | None) -> str:
        if isinstance(error, errors.ChiasmError):
            return error.reason
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            # grpc cancels a call whose deadline is over just as one that the client gave up.
            is_late = self._deadline.left_s() < _CLOCK_SLACK_S
            return errors.DeadlineExceeded.default_reason if is_late else "CANCELLED"
        return errors.Internal.default_reason


def _output_type(grammar: Grammar | None) -> str:
    return "json" if grammar is not None and "json" in grammar.field else "text"
