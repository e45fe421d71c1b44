"""Whether a loop that computes gets on: what liveness is made of. Free of grpc and torch."""

from __future__ import annotations

import math
import time


class Pulse:
    """A clock that runs while a loop has work, and starts anew with each of its steps.

    `begin` is for whoever hands work over, so that a loop which never wakes up for it is noticed;
    `beat` and `rest` are for the loop alone. May be read and set from any thread.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self.has_ended = False

    def begin(self) -> None:
        """There is work: starts the clock, unless it runs."""
        if self._since is None:
            self._since = time.monotonic()

    def beat(self) -> None:
        """The loop has got on: starts the clock anew."""
        self._since = time.monotonic()

    def rest(self) -> None:
        """There is nothing to do: stops the clock."""
        self._since = None

    def end(self) -> None:
        """The loop can get on no more, whether or not it has work: only a new process can."""
        self.has_ended = True

    def stalled_s(self) -> float:
        """Seconds since the last step of a loop that has work; 0 while it has none; without end for
        one that can get on no more."""
        if self.has_ended:
            return math.inf
        since = self._since
        return 0.0 if since is None else time.monotonic() - since
