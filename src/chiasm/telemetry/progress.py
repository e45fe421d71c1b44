"""Progress of long work: a bar for a person at a terminal, log lines for everybody else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

log = structlog.get_logger()

LOG_EVERY_S = 30.0
"""Seconds, or a little more: a line is written when something has been done."""


@contextmanager
def loading(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what is called with each amount done, `total` together."""
    start = time.monotonic()
    if sys.stderr.isatty():
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"loading {what}", total=total)
            yield lambda amount: bar.advance(task, amount)
    else:
        yield lambda amount: None
        log.info("weights_loaded", what=what, seconds=round(time.monotonic() - start, 3))


@contextmanager
def writing(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what is called with each number of bytes done, `total` together."""
    start = time.monotonic()
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total)
            yield lambda amount: bar.advance(task, amount)
    else:
        yield _Lines(what, total).advance
        log.info("written", what=what, seconds=round(time.monotonic() - start, 3))


class _Lines:
    """Says now and then how far work is, and how much longer it takes at the pace since the last
    line: to copy is faster than to encode, and what an earlier run has done takes no time at all.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._said, self._said_at = 0, time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        new, elapsed_s = self._done - self._said, now - self._said_at
        if elapsed_s < LOG_EVERY_S or not new:
            return
        log.info(
            "writing",
            what=self._what,
            num_bytes=self._done,
            of=self._total,
            remaining_s=round((self._total - self._done) * elapsed_s / new),
        )
        self._said, self._said_at = self._done, now
