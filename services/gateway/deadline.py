"""The point in time by which a request must be done; every wait of the gateway asks it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from chiasm import errors


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on the monotonic clock."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The moment `seconds` from now."""
        return cls(time.monotonic() + seconds)

    def sooner(self, seconds: float) -> Deadline:
        """This moment or `seconds` from now, whichever comes first."""
        return Deadline(min(self.at_s, time.monotonic() + seconds))

    def left_s(self) -> float:
        """Seconds left; zero or less when it is over."""
        return self.at_s - time.monotonic()

    def remaining_s(self) -> float:
        """Seconds left, more than zero. Raises DeadlineExceeded when there are none."""
        left = self.left_s()
        if left <= 0:
            raise errors.DeadlineExceeded("the request's deadline has passed")
        return left
