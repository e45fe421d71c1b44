"""Where the engine's thread waits for whatever expert servers send.

Lanes wake it through their sockets, the event loop through `post`; what arrives is handled on the
engine's thread, so that calls and dispatches need no locks.
"""

from __future__ import annotations

import contextlib
import os
import selectors
from collections import deque
from collections.abc import Callable

Handler = Callable[[], None]


class Inbox:
    """One pool's. Everything but `post` is for the engine's thread."""

    def __init__(self) -> None:
        self._posted: deque[Handler] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._woken)

    def post(self, handler: Handler) -> None:
        """Has something done on the engine's thread when it next waits; from any thread."""
        self._posted.append(handler)
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups
            os.write(self._wake_out, b"\0")

    def watch(self, descriptor: int, on_readable: Handler) -> None:
        """Calls the handler while the descriptor can be read."""
        self._selector.register(descriptor, selectors.EVENT_READ, on_readable)

    def unwatch(self, descriptor: int) -> None:
        """Ends a watch, before the descriptor is closed."""
        self._selector.unregister(descriptor)

    def handle_posted(self) -> None:
        """Does what was posted, without waiting."""
        while self._posted:
            self._posted.popleft()()

    def wait(self, timeout_s: float) -> None:
        """Handles what has arrived, or what arrives first within the time."""
        for key, _ in self._selector.select(timeout_s):
            key.data()

    def close(self) -> None:
        """Does what is left to do and ends it; the engine's thread must have ended."""
        self.handle_posted()
        self._selector.close()
        os.close(self._wake_in)
        os.close(self._wake_out)

    def _woken(self) -> None:
        os.read(self._wake_in, 4096)
        self.handle_posted()
