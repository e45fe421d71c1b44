"""The step loop: schedule -> forward -> commit, on a thread of its own. No grpc.

Only `_commit` changes a sequence's tokens, so a step that fails half way has changed nothing that
counts: keys and values it wrote are written again by the next try.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import structlog
import torch

from chiasm import errors
from chiasm.services.decoder import spans
from chiasm.services.decoder.forward import ForwardPass
from chiasm.services.decoder.pools import ExpertPools, PoolUnavailable
from chiasm.services.decoder.sampler import Choice, choose, prompt_events
from chiasm.services.decoder.scheduler import Chunk, Scheduler
from chiasm.services.decoder.sequence import (
    FailedEvent,
    FinishedEvent,
    Sequence,
    TokenEvent,
)
from chiasm.telemetry import metrics
from chiasm.types import TOKEN_TEXT, Modality

IDLE_WAIT_S = 0.05
"""How often an engine that has only parked requests looks whether their pool is back."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """A moment's work."""

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_total: int


class Engine:
    """Owns the scheduler and every sequence in it.

    `submit` and `abort` may be called from any thread; sinks are called from the engine's.
    """

    def __init__(
        self,
        forward_pass: ForwardPass,
        scheduler: Scheduler,
        pools: ExpertPools,
        *,
        park_timeout_s: float,
    ) -> None:
        self._forward_pass, self._scheduler, self._pools = forward_pass, scheduler, pools
        self._park_timeout_ns = int(park_timeout_s * 1e9)
        self._inbox: deque[Sequence] = deque()
        self._wake = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.steps = 0
        # Looked up when scraped: whatever ends a request, no gauge is left behind.
        metrics.RUNNING_REQUESTS.set_function(lambda: self.load().running)
        metrics.WAITING_REQUESTS.set_function(lambda: self.load().waiting)
        metrics.KV_TOKENS_USED.set_function(lambda: self.load().kv_tokens_used)
        metrics.KV_TOKENS_TOTAL.set(self.load().kv_tokens_total)

    def start(self) -> None:
        """Starts the loop."""
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        """Hands a sequence over; its sink gets every event up to finished or failed."""
        sequence.timings.submitted = time.monotonic_ns()
        with self._wake:
            if self._stopped:
                raise errors.Unavailable("the decoder is stopping", retry_after_s=1.0)
            self._inbox.append(sequence)
            self._wake.notify()

    def abort(self, sequence: Sequence) -> None:
        """Ends a sequence before the next step, without an event."""
        with self._wake:
            sequence.aborted = True
            self._wake.notify()

    def load(self) -> EngineLoad:
        """Requests and cache in use now."""
        blocks = self._scheduler.blocks
        return EngineLoad(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting) + len(self._inbox),
            kv_tokens_used=blocks.num_held * blocks.block_size,
            kv_tokens_total=blocks.num_blocks * blocks.block_size,
        )

    def close(self) -> None:
        """Stops after the current step and fails what is left."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._stopped and not self._inbox and not any(self._scheduler):
                    self._wake.wait()
                if self._stopped:
                    break
            self._take_in()
            try:
                progressed = self._step()
            except Exception:
                ids = [sequence.request_id for sequence in self._scheduler]
                log.exception("step_failed", request_ids=ids)
                self._fail_all(errors.Internal("the engine failed; the log has the request id"))
                continue
            if not progressed:
                with self._wake:
                    self._wake.wait(IDLE_WAIT_S)
        self._take_in()
        self._fail_all(errors.Unavailable("the decoder is stopping", retry_after_s=1.0))

    def _take_in(self) -> None:
        """Moves arrivals to the scheduler and takes the aborted out."""
        while self._inbox:
            sequence = self._inbox.popleft()
            try:
                self._scheduler.add(sequence)
            except errors.ResourceExhausted as error:
                sequence.sink(FailedEvent(error=error))
        for sequence in [s for s in self._scheduler if s.aborted]:
            self._end(sequence)

    def _step(self) -> bool:
        """One step; False when nothing could run."""
        start = time.monotonic_ns()
        schedule = self._scheduler.schedule(self._pools.covered())
        metrics.PREEMPTIONS.inc(len(schedule.preempted))
        for sequence in schedule.admitted:
            self._admitted(sequence, start)
        self._wait_or_fail(schedule.parked, since=start)
        if not schedule.chunks:
            return False
        waits_before = dict(self._pools.wait_ns)
        try:
            with spans.step(schedule.chunks, self.steps), torch.inference_mode():
                sampled = self._forward(schedule.chunks)
        except PoolUnavailable as error:
            self._park(schedule.chunks, error, start)
            return False
        waited = {m: ns - waits_before[m] for m, ns in self._pools.wait_ns.items()}
        # Before anybody hears of the step, so that whoever has its answer finds it counted.
        self._measure(schedule.chunks, time.monotonic_ns() - start)
        self._commit(schedule.chunks, sampled, waited)
        return True

    def _admitted(self, sequence: Sequence, now: int) -> None:
        if sequence.timings.admitted:
            return  # preempted before: it has been here
        spans.admitted(sequence, now)
        metrics.DECODER_QUEUE_SECONDS.observe((now - sequence.timings.submitted) / 1e9)
        metrics.PREFIX_CACHE_QUERIES.inc(sequence.num_prompt)
        metrics.PREFIX_CACHE_HITS.inc(sequence.num_cached)

    def _forward(self, chunks: tuple[Chunk, ...]) -> list[Choice | None]:
        """Runs the chunks; a choice for each one that ends its sequence, else None."""
        hidden = self._forward_pass.run(chunks)
        self._send_prompt_logits(chunks, hidden)
        ends = itertools.accumulate(c.num_tokens for c in chunks)
        last = [end - 1 for c, end in zip(chunks, ends, strict=True) if c.is_last]
        if not last:
            return [None] * len(chunks)
        logits = self._forward_pass.model.logits(hidden[last])
        choices = iter(choose(logits, [c.sequence for c in chunks if c.is_last]))
        return [next(choices) if c.is_last else None for c in chunks]

    def _send_prompt_logits(self, chunks: tuple[Chunk, ...], hidden: torch.Tensor) -> None:
        row = 0
        for chunk in chunks:
            sequence = chunk.sequence
            stop = min(chunk.stop, sequence.num_prompt)
            # A preempted request computes rows again that were sent before.
            start = max(chunk.start, sequence.num_logits_sent)
            if sequence.needs_prompt_rows and start < stop:
                wanted = hidden[row + start - chunk.start : row + stop - chunk.start]
                logits = self._forward_pass.model.logits(wanted)
                for event in prompt_events(sequence, start, logits):
                    sequence.sink(event)
                sequence.num_logits_sent = stop
            row += chunk.num_tokens

    def _commit(
        self,
        chunks: tuple[Chunk, ...],
        sampled: list[Choice | None],
        waited: dict[Modality, int],
    ) -> None:
        """The only place where a step changes sequences."""
        now = time.monotonic_ns()
        self.steps += 1
        for chunk, choice in zip(chunks, sampled, strict=True):
            sequence = chunk.sequence
            sequence.parked_since = None
            self._scheduler.commit(sequence, chunk.stop)
            for modality in Modality:
                sequence.timings.expert_wait[modality] += waited[modality]
            if choice is None:
                continue
            if choice.error is not None:
                self._fail(sequence, choice.error)
                continue
            token = choice.token_id
            sequence.token_ids.append(token)
            if not sequence.timings.first_token:
                spans.first_token(sequence, now)
            sequence.sink(TokenEvent(token_id=token, logprob=choice.logprob, top=choice.top))
            if reason := sequence.finish_reason:
                sequence.timings.finished = now
                self._end(sequence)
                sequence.sink(FinishedEvent(reason=reason))

    def _end(self, sequence: Sequence, error: Exception | None = None) -> None:
        """Takes a sequence off the books, before anybody hears that it is over."""
        spans.ended(sequence, error)
        self._scheduler.remove(sequence)

    def _fail(self, sequence: Sequence, error: errors.ChiasmError) -> None:
        self._end(sequence, error)
        sequence.sink(FailedEvent(error=error))

    def _fail_all(self, error: errors.ChiasmError) -> None:
        for sequence in list(self._scheduler):
            self._fail(sequence, error)

    def _park(self, chunks: tuple[Chunk, ...], error: PoolUnavailable, start: int) -> None:
        """After a step that a pool failed: its requests wait for the pool, the others go on."""
        parked = [c.sequence for c in chunks if error.modality in c.modalities]
        log.warning(
            "pool_away",
            modality=error.modality,
            detail=error.message[:256],
            request_ids=[sequence.request_id for sequence in parked],
        )
        self._wait_or_fail(parked, since=start)

    def _wait_or_fail(self, sequences: Iterable[Sequence], *, since: int) -> None:
        """Books sequences as waiting for a pool; fails those that have waited too long."""
        now = time.monotonic_ns()
        for sequence in sequences:
            if sequence.parked_since is None:
                sequence.parked_since = since
            if now - sequence.parked_since >= self._park_timeout_ns:
                self._fail(
                    sequence,
                    errors.Unavailable(
                        "an expert pool the request needs is away",
                        reason="EXPERT_POOL_UNAVAILABLE",
                        retry_after_s=5.0,
                    ),
                )

    def _measure(self, chunks: tuple[Chunk, ...], step_ns: int) -> None:
        metrics.STEP_SECONDS.observe(step_ns / 1e9)
        for chunk in chunks:
            prompt_stop = min(chunk.stop, chunk.sequence.num_prompt)
            types = chunk.sequence.prompt_types[chunk.start : prompt_stop]
            num_text = types.count(TOKEN_TEXT)
            metrics.STEP_TOKENS.labels("prefill", "text").inc(num_text)
            metrics.STEP_TOKENS.labels("prefill", "vision").inc(len(types) - num_text)
            metrics.STEP_TOKENS.labels("decode", "text").inc(chunk.num_tokens - len(types))
