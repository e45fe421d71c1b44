"""A thread's one place to wait: descriptors that can be read, and other threads that wake it."""

from __future__ import annotations

import contextlib
import os
import selectors
from collections.abc import Callable

Handler = Callable[[], None]


class Wakeup:
    """Everything but `wake` is for the thread that waits."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self.watch(self._wake_in, self._woken)

    def wake(self) -> None:
        """Ends the wait under way, or else the next one; from any thread."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups
            os.write(self._wake_out, b"\0")

    def watch(self, descriptor: int, on_readable: Handler) -> None:
        """Calls the handler whenever the descriptor can be read during a wait."""
        self._selector.register(descriptor, selectors.EVENT_READ, on_readable)

    def unwatch(self, descriptor: int) -> None:
        """Ends a watch, before the descriptor is closed."""
        self._selector.unregister(descriptor)

    def wait(self, timeout_s: float | None) -> None:
        """Handles what can be read now, or first within the time; None: whenever that is."""
        for key, _ in self._selector.select(timeout_s):
            key.data()

    def close(self) -> None:
        """Gives the descriptors back; nobody may wake it any more."""
        self._selector.close()
        os.close(self._wake_in)
        os.close(self._wake_out)

    def _woken(self) -> None:
        os.read(self._wake_in, 4096)
