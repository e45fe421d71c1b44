"""Which of a shard's holders is slow: not late for once, which hedging hides, but all the time.

Servers are compared with each other, by what they took for dispatches of like size; one that has
failed is slower than any. All that is soon forgotten, and a server of which nothing is known is
asked first, so one that was slow is tried again while the others go on.
"""

from __future__ import annotations

import math

SLOW = 3.0
"""A server takes so many times longer than another. Less may come of the shards they hold."""

FORGOTTEN_S = 5.0
"""What a server took is known for so long."""

WEIGHT = 0.2
"""Of the newest duration in the mean."""

MOST = 4.0
"""No duration counts for more than so many means: one stall does not make a server slow."""


class Pace:
    """What one server takes, by size."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, float]] = {}  # mean, and when it was last added to
        self._failed_at = -math.inf

    def add(self, num_tokens: int, seconds: float, now: float) -> None:
        """Books an answer."""
        if mean := self._recent_s(num_tokens, now):
            seconds = mean + WEIGHT * (min(seconds, MOST * mean) - mean)
        self._known[num_tokens.bit_length()] = (seconds, now)

    def fail(self, now: float) -> None:
        """Books that no answer came, or none of use."""
        self._failed_at = now

    def mean_s(self, num_tokens: int, now: float) -> float:
        """Of dispatches of like size; 0 when nothing is known."""
        has_failed = now < self._failed_at + FORGOTTEN_S
        return math.inf if has_failed else self._recent_s(num_tokens, now)

    def _recent_s(self, num_tokens: int, now: float) -> float:
        mean, at = self._known.get(num_tokens.bit_length(), (0.0, -math.inf))
        return mean if now < at + FORGOTTEN_S else 0.0


def is_slow(mean_s: float, best_s: float) -> bool:
    """Whether another server, which takes best_s, should be asked instead."""
    return mean_s > SLOW * best_s
