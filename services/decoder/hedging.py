"""When a dispatch that is slow to come back goes to a replica too.

The delay is a high quantile of what dispatches of like size took of late: few are later than that
for no reason. A budget bounds the share of dispatches that are sent twice: when all servers are
slow because they are overloaded, twice the work would not help.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

QUANTILE = 0.99
"""A dispatch later than this share of the others is slow."""

WINDOW = 256
"""So many dispatches of one size class are remembered."""

MIN_SAMPLES = 16
"""With fewer, FIRST_DELAY_S stands for the quantile."""

REFRESH = 16
"""The quantile is computed anew after so many dispatches."""

FIRST_DELAY_S = 1.0
MIN_DELAY_S = 0.005
"""Shorter than this, a hiccup of the scheduler would be taken for a slow server."""

BURST = 8.0
"""Hedges that may be sent in a row after a time without."""


@dataclass(slots=True)
class _Sizes:
    """Durations of dispatches of like size."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    num_new: int = 0
    delay_s: float = FIRST_DELAY_S

    def add(self, seconds: float) -> None:
        self.recent.append(seconds)
        self.num_new += 1
        if self.num_new >= REFRESH and len(self.recent) >= MIN_SAMPLES:
            self.num_new = 0
            ranked = sorted(self.recent)
            self.delay_s = max(MIN_DELAY_S, ranked[int(QUANTILE * (len(ranked) - 1))])


class HedgePolicy:
    """Decides from measured durations. Pure: times are handed in.

    budget: share of dispatches that may go out twice; 0: none. after_s: a fixed delay; 0: derived.
    """

    def __init__(self, *, budget: float, after_s: float) -> None:
        self._budget, self._after_s = budget, after_s
        self._credit = BURST if budget else 0.0
        self._classes: dict[int, _Sizes] = {}

    def delay_s(self, num_tokens: int) -> float:
        """How long to wait for a server before a replica is asked too."""
        if not self._budget:
            return math.inf
        if self._after_s:
            return self._after_s
        known = self._classes.get(num_tokens.bit_length())
        return known.delay_s if known is not None else FIRST_DELAY_S

    def sent(self) -> None:
        """Books a dispatch that is not a hedge: it earns a share of one."""
        self._credit = min(BURST, self._credit + self._budget) if self._budget else 0.0

    def answered(self, num_tokens: int, seconds: float) -> None:
        """Books how long a server took."""
        self._classes.setdefault(num_tokens.bit_length(), _Sizes()).add(seconds)

    def may_hedge(self) -> bool:
        """Takes one hedge from the budget; False when there is none left."""
        if self._credit < 1:
            return False
        self._credit -= 1
        return True
