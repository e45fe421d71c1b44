"""Where the engine's thread waits for whatever expert servers send.

Lanes wake it through their sockets, the event loop through `post`; what arrives is handled on the
engine's thread, so that calls and dispatches need no locks.
"""

from __future__ import annotations

from collections import deque

from chiasm.transport.wakeup import Handler, Wakeup


class Inbox:
    """One pool's. Everything but `post` is for the engine's thread."""

    def __init__(self) -> None:
        self._posted: deque[Handler] = deque()
        self._wakeup = Wakeup()

    def post(self, handler: Handler) -> None:
        """Has something done on the engine's thread when it next waits; from any thread."""
        self._posted.append(handler)
        self._wakeup.wake()

    def watch(self, descriptor: int, on_readable: Handler) -> None:
        """Calls the handler while the descriptor can be read."""
        self._wakeup.watch(descriptor, on_readable)

    def unwatch(self, descriptor: int) -> None:
        """Ends a watch, before the descriptor is closed."""
        self._wakeup.unwatch(descriptor)

    def handle_posted(self) -> None:
        """Does what was posted, without waiting."""
        while self._posted:
            self._posted.popleft()()

    def wait(self, timeout_s: float) -> None:
        """Handles what has arrived, or what arrives first within the time."""
        self._wakeup.wait(timeout_s)
        self.handle_posted()

    def close(self) -> None:
        """Does what is left to do and ends it; the engine's thread must have ended."""
        self.handle_posted()
        self._wakeup.close()
