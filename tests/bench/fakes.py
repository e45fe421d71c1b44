"""A backend without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from chiasm.bench.backend import Call, Done, Event, Exchange, RequestFailed, Tokens
from chiasm.bench.workload import Turn

FIRST_S, GAP_S = 0.1, 0.02


@dataclass
class FakeBackend:
    """Answers after FIRST_S, then a token every GAP_S.

    stall: (from, to): a request heard within waits until `to` first.
    fails: reason by the number of the request, counted from 0 as they are sent.
    """

    stall: tuple[float, float] = (0.0, 0.0)
    fails: Callable[[int], str] = lambda i: ""
    prepared: list[Turn] = field(default_factory=list)
    histories: list[tuple[Exchange, ...]] = field(default_factory=list)
    sent_at: list[float] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    async def describe(self) -> dict[str, object]:
        return {"name": "fake"}

    async def close(self) -> None:
        return

    def prepare(self, history: Sequence[Exchange], turn: Turn) -> Call:
        self.prepared.append(turn)
        self.histories.append(tuple(history))
        return lambda timeout_s: self._answer(turn)

    async def _answer(self, turn: Turn) -> AsyncGenerator[Event, None]:
        now = asyncio.get_running_loop().time()
        self.sent_at.append(now)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if reason := self.fails(len(self.sent_at) - 1):
                raise RequestFailed(reason)
            start, end = self.stall
            if start <= now < end:
                await asyncio.sleep(end - now)
            for i in range(turn.max_tokens):
                await asyncio.sleep(GAP_S if i else FIRST_S)
                yield Tokens(1, f"w{i} ", (i,))
            yield Done(
                input_tokens=turn.num_text_tokens,
                output_tokens=turn.max_tokens,
                timings_ns={"queue": 1_000_000, "prefill": 2_000_000, "decode": 3_000_000},
            )
        finally:
            self.in_flight -= 1
