"""Progress of long work: a bar for a person at a terminal, one log line for everybody else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

log = structlog.get_logger()


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
        yield lambda amount: None
        log.info("written", what=what, seconds=round(time.monotonic() - start, 3))
