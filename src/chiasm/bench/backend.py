"""The seam between the generator and the systems it drives."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from chiasm.bench.workload import Turn


@dataclass(frozen=True, slots=True)
class Tokens:
    """One piece of the answer as it came in; `num_tokens` may be unknown and is then 1."""

    num_tokens: int
    text: str = ""
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The answer is complete. Counts are the server's own, None where it does not tell.

    timings_ns: the server's account of the request's time, part -> nanoseconds.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    timings_ns: Mapping[str, int] = field(default_factory=dict)


Event = Tokens | Done


@dataclass(frozen=True, slots=True)
class Exchange:
    """A turn that has been answered."""

    turn: Turn
    text: str
    token_ids: tuple[int, ...]


class RequestFailed(Exception):
    """A request failed; `reason` is a short word, to be counted."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


class Call(Protocol):
    """A request that is ready to be sent."""

    def __call__(self, timeout_s: float) -> AsyncGenerator[Event, None]:
        """Sends it: Tokens as they arrive, then one Done. Raises RequestFailed."""
        ...


class Backend(Protocol):
    """A system under load, connected."""

    async def describe(self) -> dict[str, object]:
        """What answers: the model's name and whatever else the server tells."""
        ...

    def prepare(self, history: Sequence[Exchange], turn: Turn) -> Call:
        """Makes the content of a request. Runs in a thread, so that sending is not held up."""
        ...

    async def close(self) -> None:
        """Ends the connection."""
        ...
