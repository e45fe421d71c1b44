"""The step loop: schedule -> forward -> commit, on a thread of its own. No grpc.

Only `_commit` changes a sequence's tokens, so a step that fails half way has changed nothing that
counts: keys and values it wrote are written again by the next try.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import structlog
import torch

from chiasm import errors
from chiasm.kernels.device import is_device_lost, is_out_of_memory
from chiasm.load import DecoderLoad
from chiasm.pulse import Pulse
from chiasm.services.decoder import spans
from chiasm.services.decoder.forward import ForwardPass
from chiasm.services.decoder.pools import ExpertPools, PoolFailed, PoolUnavailable
from chiasm.services.decoder.sampler import PROMPT_ROWS, Choice, choose, prompt_events
from chiasm.services.decoder.scheduler import Chunk, Schedule, Scheduler
from chiasm.services.decoder.sequence import (
    FailedEvent,
    FinishedEvent,
    Sequence,
    TokenEvent,
)
from chiasm.services.decoder.speculation import num_accepted
from chiasm.services.decoder.workload import Workload
from chiasm.telemetry import metrics
from chiasm.types import Modality

IDLE_WAIT_S = 0.05
"""How often an engine that has only parked requests looks whether their pool is back."""

TIDY_S = 1.0
"""How often an engine lets its pools see to what has arrived: one may have nothing to do."""

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
        self._tidied_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.steps = 0
        self.pulse = Pulse()
        self._workload = Workload()
        # Looked up when scraped: whatever ends a request, no gauge is left behind.
        metrics.RUNNING_REQUESTS.set_function(lambda: self.load().running)
        metrics.WAITING_REQUESTS.set_function(lambda: self.load().waiting)
        metrics.KV_TOKENS_USED.set_function(lambda: self.load().kv_tokens_used)
        metrics.KV_TOKENS_TOTAL.set(self.load().kv_tokens_total)

    def start(self) -> None:
        """Starts the loop."""
        self._thread.start()

    def check_room(self, num_coming: int) -> None:
        """Raises ResourceExhausted when there is no room beside `num_coming` not submitted yet."""
        self._scheduler.check_room(len(self._inbox) + num_coming)

    def submit(self, sequence: Sequence) -> None:
        """Hands a sequence over; its sink gets every event up to finished or failed."""
        sequence.timings.submitted = time.monotonic_ns()
        with self._wake:
            if self._stopped:
                raise errors.Unavailable("the decoder is stopping", retry_after_s=1.0)
            if self.pulse.has_ended:  # failing at once, it would look like the least busy one
                raise errors.Unavailable("the device is lost")
            self._inbox.append(sequence)
            self.pulse.begin()
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

    def report(self) -> DecoderLoad:
        """How busy the decoder is, for the orchestrator."""
        now = self.load()
        return self._workload.report(
            self._scheduler,
            self._pools.covered(),
            running=now.running,
            max_running=self._scheduler.max_running,
            waiting=now.waiting,
            kv_tokens_used=now.kv_tokens_used,
            kv_tokens_capacity=now.kv_tokens_total,
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
                if not self._stopped and not self._has_work():
                    self.pulse.rest()
                    self._wake.wait(TIDY_S)
                if self._stopped:
                    break
            try:
                self._tidy()
                if not self._has_work():
                    continue
                self.pulse.beat()
                self._take_in()
                progressed = self._step()
            except Exception as error:
                self._step_failed(list(self._scheduler), error)
                continue
            if not progressed:
                with self._wake:
                    if not self._inbox:
                        self._wake.wait(IDLE_WAIT_S)
        self._take_in()
        for sequence in list(self._scheduler):
            self._fail(sequence, errors.Unavailable("the decoder is stopping", retry_after_s=1.0))

    def _tidy(self) -> None:
        if time.monotonic() - self._tidied_at >= TIDY_S:
            self._tidied_at = time.monotonic()
            self._pools.tidy()

    def _has_work(self) -> bool:
        return bool(self._inbox) or any(self._scheduler)

    def _take_in(self) -> None:
        """Takes the aborted out and moves arrivals to the scheduler."""
        for sequence in [s for s in self._scheduler if s.aborted]:
            self._end(sequence)
        while self._inbox:
            sequence = self._inbox.popleft()
            if sequence.aborted:
                self._end(sequence)
                continue
            try:
                self._scheduler.add(sequence)
            except errors.ResourceExhausted as error:
                sequence.sink(FailedEvent(error=error))

    def _step(self) -> bool:
        """One step; False when nothing could run."""
        start = time.monotonic_ns()
        covered = self._pools.covered()
        schedule = self._scheduler.schedule(covered)
        metrics.PREEMPTIONS.inc(len(schedule.preempted))
        for sequence in schedule.admitted:
            self._admitted(sequence, start)
        self._unpark(schedule, covered)
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
        except PoolFailed as error:
            self._give_up(schedule.chunks, error)
            return True
        except Exception as error:
            self._step_failed([chunk.sequence for chunk in schedule.chunks], error)
            return True
        waited = {m: ns - waits_before[m] for m, ns in self._pools.wait_ns.items()}
        # Before anybody hears of the step, so that whoever has its answer finds it counted.
        self._workload.add_step(schedule.chunks, time.monotonic_ns() - start)
        self._commit(schedule.chunks, sampled, waited)
        return True

    def _admitted(self, sequence: Sequence, now: int) -> None:
        if sequence.timings.admitted:
            return  # preempted before: it has been here
        sequence.num_prompt_cached = min(sequence.num_cached, sequence.num_prompt)
        spans.admitted(sequence, now)
        metrics.DECODER_QUEUE_SECONDS.observe((now - sequence.timings.submitted) / 1e9)
        metrics.PREFIX_CACHE_QUERIES.inc(sequence.num_prompt)
        metrics.PREFIX_CACHE_HITS.inc(sequence.num_prompt_cached)

    def _forward(self, chunks: tuple[Chunk, ...]) -> list[list[Choice]]:
        """Runs the chunks; the choices that follow each one: none unless it ends its sequence, more
        than one where guesses were right."""
        hidden = self._forward_pass.run(chunks)
        self._send_prompt_logits(chunks, hidden)
        ends = itertools.accumulate(c.num_tokens for c in chunks)
        # A guess is judged by the row before it; the row of the last one yields one more token.
        places = [
            (end - 1 - len(chunk.draft) + ahead, chunk.sequence, ahead)
            for chunk, end in zip(chunks, ends, strict=True)
            if chunk.is_last
            for ahead in range(len(chunk.draft) + 1)
        ]
        if not places:
            return [[] for _ in chunks]
        rows, sequences, ahead = zip(*places, strict=True)
        logits = self._forward_pass.model.logits(hidden[list(rows)])
        choices = iter(choose(logits, sequences, ahead))
        return [_kept(chunk, choices) if chunk.is_last else [] for chunk in chunks]

    def _send_prompt_logits(self, chunks: tuple[Chunk, ...], hidden: torch.Tensor) -> None:
        row = 0
        for chunk in chunks:
            sequence = chunk.sequence
            stop = min(chunk.stop, sequence.num_prompt)
            # A preempted request computes rows again that were sent before.
            start = max(chunk.start, sequence.num_logits_sent)
            if sequence.needs_prompt_rows and start < stop:
                first = row - chunk.start
                for at in range(start, stop, PROMPT_ROWS):
                    rows = hidden[first + at : first + min(at + PROMPT_ROWS, stop)]
                    logits = self._forward_pass.model.logits(rows)
                    for event in prompt_events(sequence, at, logits):
                        sequence.sink(event)
                sequence.num_logits_sent = stop
            row += chunk.num_tokens

    def _commit(
        self,
        chunks: tuple[Chunk, ...],
        sampled: list[list[Choice]],
        waited: dict[Modality, int],
    ) -> None:
        """The only place where a step changes sequences."""
        now = time.monotonic_ns()
        self.steps += 1
        for chunk, choices in zip(chunks, sampled, strict=True):
            sequence = chunk.sequence
            sequence.parked_since = None
            for modality in Modality:
                sequence.timings.expert_wait[modality] += waited[modality]
            if choices:
                self._append(sequence, choices, now)
            else:
                self._scheduler.commit(sequence, chunk.stop)

    def _append(self, sequence: Sequence, choices: list[Choice], now: int) -> None:
        """Gives a sequence its next tokens, up to one that ends the answer or cannot be had."""
        for choice in choices:
            if choice.error is not None:
                if isinstance(choice.error, errors.Internal):
                    self._scheduler.forget(sequence)
                self._fail(sequence, choice.error)
                return
            if not sequence.timings.first_token:
                spans.first_token(sequence, now)
            sequence.token_ids.append(choice.token_id)
            # The keys and values of this token come with the next step.
            self._scheduler.commit(sequence, len(sequence.token_ids) - 1)
            reason = sequence.finish_reason
            if reason is not None:
                sequence.timings.finished = now
                self._end(sequence)
            sequence.sink(
                TokenEvent(token_id=choice.token_id, logprob=choice.logprob, top=choice.top)
            )
            if reason is not None:
                sequence.sink(FinishedEvent(reason=reason))
                return

    def _end(self, sequence: Sequence, error: Exception | None = None) -> None:
        """Takes a sequence off the books, before anybody hears that it is over."""
        spans.ended(sequence, error)
        self._workload.add_end(sequence)
        self._scheduler.remove(sequence)

    def _fail(self, sequence: Sequence, error: errors.ChiasmError) -> None:
        self._end(sequence, error)
        sequence.sink(FailedEvent(error=error))

    def _step_failed(self, sequences: list[Sequence], error: BaseException) -> None:
        """After an exception nobody has foreseen: the sequences of the step fail.

        All do when the device is lost: nothing can be computed here any more, while to another
        decoder nothing is wrong. What may go well there fails as Unavailable.
        """
        ids = [sequence.request_id for sequence in sequences]
        log.error("step_failed", request_ids=ids, exc_info=error)
        failure: errors.ChiasmError
        if is_device_lost(error):
            self.pulse.end()
            failure, sequences = errors.Unavailable("the device is lost"), list(self._scheduler)
        elif is_out_of_memory(error):
            failure = errors.Unavailable("the decoder is out of memory")
        else:
            failure = errors.Internal("the engine failed; the log has the request id")
        for sequence in sequences:
            self._fail(sequence, failure)

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

    def _give_up(self, chunks: tuple[Chunk, ...], error: PoolFailed) -> None:
        """After a step that a pool cannot compute: its requests fail, the others go on."""
        failed = [c.sequence for c in chunks if error.modality in c.modalities]
        cause = error.__cause__
        if cause is not None and (is_device_lost(cause) or is_out_of_memory(cause)):
            self._step_failed(failed, cause)
            return
        ids = [sequence.request_id for sequence in failed]
        log.error("pool_failed", modality=error.modality, request_ids=ids, exc_info=error)
        for sequence in failed:
            self._fail(sequence, error)

    def _unpark(self, schedule: Schedule, covered: frozenset[Modality]) -> None:
        """Those that wait for something else than their pools are parked no longer; those that the
        step runs are judged by its end."""
        running = {chunk.sequence for chunk in schedule.chunks}
        for sequence in self._scheduler:
            is_parked = sequence.parked_since is not None and sequence not in running
            if is_parked and sequence.modalities(0, len(sequence.token_ids)) <= covered:
                sequence.parked_since = None

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
                        reason=errors.EXPERT_POOL_UNAVAILABLE,
                        retry_after_s=5.0,
                    ),
                )


def _kept(chunk: Chunk, choices: Iterator[Choice]) -> list[Choice]:
    """The next token, after the guesses that it confirms; books how good they were."""
    found = list(itertools.islice(choices, len(chunk.draft) + 1))
    if not chunk.draft:
        return found
    count = num_accepted(chunk.draft, [choice.token_id for choice in found])
    chunk.sequence.drafts.record(count)
    metrics.DRAFTED_TOKENS.inc(len(chunk.draft))
    metrics.ACCEPTED_TOKENS.inc(count)
    return found[: count + 1]
