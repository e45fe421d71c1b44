"""The compute thread: jobs in order of arrival, from the event loop and from lanes alike.

It waits for both in one place, so that a packet on a lane wakes the thread that computes it, and no
other thread first.
"""

from __future__ import annotations

import threading
from collections import deque

import structlog

from chiasm.pulse import Pulse
from chiasm.transport.wakeup import Handler, Wakeup

log = structlog.get_logger()


class Worker:
    """One thread. `watch` may be called before `start`, and by jobs and handlers after it."""

    def __init__(self, name: str) -> None:
        self._jobs: deque[Handler] = deque()
        self._is_running = False
        self._is_closed = False
        self._wakeup = Wakeup()
        self.pulse = Pulse()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def num_jobs(self) -> int:
        """Jobs waiting or running."""
        return len(self._jobs) + self._is_running

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def submit(self, job: Handler) -> None:
        """Queues a job, which must not raise; from any thread."""
        self._jobs.append(job)
        self.pulse.begin()
        if threading.get_ident() != self._thread.ident:
            self._wakeup.wake()

    def watch(self, descriptor: int, on_readable: Handler) -> None:
        """Calls the handler on the compute thread whenever the descriptor can be read."""
        self._wakeup.watch(descriptor, on_readable)

    def unwatch(self, descriptor: int) -> None:
        """Ends a watch, before the descriptor is closed."""
        self._wakeup.unwatch(descriptor)

    def close(self) -> None:
        """Ends the thread after the job it is at; what is queued is dropped."""
        self._is_closed = True
        self._wakeup.wake()

    def _run(self) -> None:
        while not self._is_closed:
            if not self._jobs:
                self.pulse.rest()  # whoever submits just now wakes the thread, and it beats again
            try:
                self._wakeup.wait(0 if self._jobs else None)
                self.pulse.beat()
                if self._jobs and not self._is_closed:
                    self._is_running = True
                    self._jobs.popleft()()
            except Exception:
                # The thread must outlive a defect in one job or handler.
                log.exception("job_failed")
            finally:
                self._is_running = False
