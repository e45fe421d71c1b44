"""One bound for the memory of all dispatches in hand, whichever way they came."""

from __future__ import annotations

import threading

from chiasm import errors


class Budget:
    """Bytes of dispatches that wait and of answers on their way out. From any thread.

    What is alone fits, however large it is: a single message has a bound of its own.
    """

    def __init__(self, max_bytes: int) -> None:
        self.held = 0
        self._max_bytes, self._lock = max_bytes, threading.Lock()

    def take(self, num_bytes: int) -> None:
        """Raises ResourceExhausted when there is no room now."""
        with self._lock:
            if self.held and self.held + num_bytes > self._max_bytes:
                raise errors.ResourceExhausted(
                    "dispatches and answers in hand take too much memory", retry_after_s=0.05
                )
            self.held += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Frees what `take` has taken."""
        with self._lock:
            self.held -= num_bytes
