"""What is known of each request, and the bounded store of a run's requests."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

MAX_REQUESTS = 500_000
"""Most requests of one run."""

MAX_GAPS = 16_000_000
"""Most gaps between chunks of one run: 128 MB."""

TIMEOUT = "TIMEOUT"
INTERRUPTED = "INTERRUPTED"
INCOMPLETE = "INCOMPLETE"
IN_FLIGHT_LIMIT = "IN_FLIGHT_LIMIT"
PREVIOUS_TURN_FAILED = "PREVIOUS_TURN_FAILED"
"""Reasons of failure that the generator gives; the others are the server's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request. Seconds; latencies count from the time the request was meant to be sent.

    intended_s: that time, from the start of the run.
    lag_s: how much later it really was sent.
    gaps_s: between successive chunks of the answer.
    error: reason of the failure, empty for an answer that is complete.
    timings_ns: the server's own account.
    """

    conversation: int
    turn: int
    num_images: int
    intended_s: float
    lag_s: float = 0.0
    ttft_s: float | None = None
    e2e_s: float = 0.0
    gaps_s: Sequence[float] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    requested_output_tokens: int = 0
    error: str = ""
    timings_ns: Mapping[str, int] = field(default_factory=dict)

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None for answers of one token."""
        if self.output_tokens < 2 or not self.gaps_s:
            return None
        return sum(self.gaps_s) / (self.output_tokens - 1)

    def to_json(self) -> dict[str, object]:
        """The record in milliseconds."""
        return {
            "conversation": self.conversation,
            "turn": self.turn,
            "images": self.num_images,
            "intended_s": round(self.intended_s, 6),
            "lag_ms": _ms(self.lag_s),
            "ttft_ms": _ms(self.ttft_s),
            "tpot_ms": _ms(self.tpot_s),
            "e2e_ms": _ms(self.e2e_s),
            "itl_ms": [_ms(gap) for gap in self.gaps_s],
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "requested_output_tokens": self.requested_output_tokens,
            "error": self.error or None,
            "server_ms": {part: round(ns / 1e6, 3) for part, ns in self.timings_ns.items()},
        }


class Collector:
    """The records of one run, in the order of their ends.

    `file` also gets each one as a line of JSON that starts with `labels`. After a failed write it
    gets no more, `file_error` says why, and the measurement goes on.
    """

    def __init__(
        self, file: TextIO | None = None, labels: Mapping[str, object] | None = None
    ) -> None:
        self.records: list[Record] = []
        self.loop_lags_s = array("d")
        self.file_error = ""
        self._file, self._labels, self._num_gaps = file, labels or {}, 0

    @property
    def is_full(self) -> bool:
        """The bound of memory is reached: nothing more may be sent."""
        return len(self.records) >= MAX_REQUESTS or self._num_gaps >= MAX_GAPS

    def add(self, record: Record) -> None:
        """Stores a request that has ended."""
        self.records.append(record)
        self._num_gaps += len(record.gaps_s)
        if self._file is not None:
            try:
                self._file.write(json.dumps({**self._labels, **record.to_json()}) + "\n")
            except OSError as error:
                self._file, self.file_error = None, str(error)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
