"""Sends a workload through a backend, in a closed or in an open loop.

Closed: `concurrency` workers, each of which sends its next conversation when the last one is
answered. Open: requests are sent at their arrival times, whatever has become of the earlier ones,
and their latency counts from those times: a server that stalls is charged for the requests that
came during the stall, and so is a generator that falls behind.

All times are the event loop's, so that a test may bring a clock of its own.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass

from chiasm.bench import records
from chiasm.bench.backend import Backend, Call, Done, Event, Exchange, RequestFailed
from chiasm.bench.records import Collector, Record
from chiasm.bench.supply import Supply
from chiasm.bench.workload import Conversation

LAG_PERIOD_S = 0.05
_BACKEND_SLACK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run. Exactly one of `arrivals` (seconds after the start) and `concurrency` is given.

    duration_s: nothing is sent later than this; what is in flight then still counts.
    think_time_s: between an answer and the next turn of its conversation.
    max_in_flight: an arrival that finds so many requests in flight fails, unsent.
    """

    conversations: Iterator[Conversation]
    arrivals: Iterator[float] | None = None
    concurrency: int | None = None
    duration_s: float | None = None
    timeout_s: float = 600.0
    think_time_s: float = 0.0
    max_in_flight: int = 1024


class Runner:
    """One run; every request sent ends as one record of `collector`, cancelled ones too."""

    def __init__(self, backend: Backend, plan: Plan, collector: Collector) -> None:
        self._backend, self._plan, self._collector = backend, plan, collector
        self._loop = asyncio.get_running_loop()
        self._supply = Supply(backend, plan.conversations)
        self._start = 0.0
        self._in_flight = 0

    async def run(self) -> None:
        """Returns when all is answered. On cancellation the requests in flight are recorded."""
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(self._supply.fill())]
            await self._supply.primed()
            self._start = self._loop.time()
            background.append(tasks.create_task(self._watch_lag()))
            async with asyncio.TaskGroup() as senders:
                if self._plan.arrivals is not None:
                    await self._open(senders, self._plan.arrivals)
                else:
                    for _ in range(self._plan.concurrency or 1):
                        senders.create_task(self._worker())
            for task in background:
                task.cancel()

    async def _open(self, senders: asyncio.TaskGroup, arrivals: Iterator[float]) -> None:
        for offset in arrivals:
            intended = self._start + offset
            if self._is_over(intended) or (ready := await self._supply.next()) is None:
                return
            conversation, call = ready
            # Never skipped: it also lets the requests that are due begin.
            await asyncio.sleep(max(0.0, intended - self._loop.time()))
            if self._in_flight >= self._plan.max_in_flight:
                self._fail_from(conversation, 0, intended, records.IN_FLIGHT_LIMIT)
            else:
                self._in_flight += 1
                senders.create_task(self._arrived(conversation, call, intended))

    async def _arrived(self, conversation: Conversation, call: Call, intended: float) -> None:
        try:
            await self._converse(conversation, call, intended)
        finally:
            self._in_flight -= 1

    async def _worker(self) -> None:
        while not self._is_over(intended := self._loop.time()):
            # The time it takes to make a request ready is the generator's, and counts as its lag.
            if (ready := await self._supply.next()) is None:
                return
            await self._converse(*ready, intended)

    async def _converse(self, conversation: Conversation, call: Call, intended: float) -> None:
        history: list[Exchange] = []
        for i, turn in enumerate(conversation.turns):
            if i:
                intended = self._loop.time() + self._plan.think_time_s
                if self._is_over(intended):
                    return
                call = await self._loop.run_in_executor(None, self._backend.prepare, history, turn)
                await asyncio.sleep(max(0.0, intended - self._loop.time()))
            request = _Request(conversation, i, intended, self._start)
            is_answered = await self._send(request, call)
            if not is_answered:
                self._fail_from(
                    conversation, i + 1, self._loop.time(), records.PREVIOUS_TURN_FAILED
                )
                return
            history.append(Exchange(turn, "".join(request.texts), tuple(request.token_ids)))

    async def _send(self, request: _Request, call: Call) -> bool:
        """Whether the answer came whole. It is recorded either way."""
        request.sent(self._loop.time())
        error = records.INCOMPLETE
        try:
            async with (
                asyncio.timeout(self._plan.timeout_s),
                aclosing(call(self._plan.timeout_s + _BACKEND_SLACK_S)) as events,
            ):
                async for event in events:
                    request.heard(event, self._loop.time())
            if request.done is not None:
                error = ""
        except TimeoutError:
            error = records.TIMEOUT
        except RequestFailed as failure:
            error = failure.reason
        except asyncio.CancelledError:
            error = records.INTERRUPTED
            raise
        finally:
            self._collector.add(request.record(self._loop.time(), error))
        return not error

    def _fail_from(self, conversation: Conversation, first: int, at: float, error: str) -> None:
        """Records turns that cannot be sent: they count, as failures."""
        for i in range(first, len(conversation.turns)):
            request = _Request(conversation, i, at, self._start)
            request.sent(self._loop.time())
            self._collector.add(request.record(self._loop.time(), error))

    def _is_over(self, at: float) -> bool:
        duration_s = self._plan.duration_s
        is_late = duration_s is not None and at - self._start > duration_s
        return is_late or self._collector.is_full

    async def _watch_lag(self) -> None:
        """Samples how late the event loop wakes a sleeper: the delay that every timestamp has."""
        while True:
            due = self._loop.time() + LAG_PERIOD_S
            await asyncio.sleep(LAG_PERIOD_S)
            self._collector.loop_lags_s.append(max(0.0, self._loop.time() - due))


class _Request:
    """A request under way."""

    def __init__(
        self, conversation: Conversation, turn: int, intended: float, start: float
    ) -> None:
        self._conversation, self._turn = conversation, turn
        self._intended, self._start = intended, start
        self._sent = self._last = intended
        self._first: float | None = None
        self._gaps, self._num_tokens = array("d"), 0
        self._keeps_answer = turn + 1 < len(conversation.turns)
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.done: Done | None = None

    def sent(self, now: float) -> None:
        self._sent = now

    def heard(self, event: Event, now: float) -> None:
        if isinstance(event, Done):
            self.done = event
            return
        if self._first is None:
            self._first = now
        else:
            self._gaps.append(now - self._last)
        self._last = now
        self._num_tokens += event.num_tokens
        if self._keeps_answer:
            self.texts.append(event.text)
            self.token_ids += event.token_ids

    def record(self, now: float, error: str) -> Record:
        turn, done = self._conversation.turns[self._turn], self.done or Done()
        output_tokens = done.output_tokens
        return Record(
            conversation=self._conversation.index,
            turn=self._turn,
            num_images=len(turn.pictures),
            intended_s=self._intended - self._start,
            lag_s=max(0.0, self._sent - self._intended),
            ttft_s=None if self._first is None else self._first - self._intended,
            e2e_s=now - self._intended,
            gaps_s=self._gaps,
            input_tokens=done.input_tokens or 0,
            output_tokens=self._num_tokens if output_tokens is None else output_tokens,
            requested_output_tokens=turn.max_tokens,
            error=error,
            timings_ns=done.timings_ns,
        )
