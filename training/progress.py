"""A run as it goes: a bar for a person at a terminal, log lines for everybody else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from chiasm.training.loop import StepReport, Watcher

log = structlog.get_logger()

_LOG_EVERY = 100
_SMOOTHING = 0.95


@contextmanager
def watching(total: int, *, done: int, tokens: int) -> Iterator[Watcher]:
    """Yields what is to be told of every step; `done` of `total` steps were taken before, on
    `tokens` tokens."""
    pace = _Pace(tokens)
    if sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task("", total=total, completed=done, numbers="")

            def advance(report: StepReport) -> None:
                pace.add(report)
                numbers = (
                    f"loss {pace.loss:.3f}  lr {report.learning_rate:.1e}  "
                    f"{pace.tokens_per_s:,.0f} tokens/s"
                )
                bar.update(task, completed=report.step, description=report.stage, numbers=numbers)

            yield advance
    else:

        def write(report: StepReport) -> None:
            pace.add(report)
            if report.step % _LOG_EVERY == 0 or report.step == total:
                left = (total - report.step) * pace.elapsed_s / (report.step - done)
                log.info(
                    "trained",
                    step=report.step,
                    of=total,
                    stage=report.stage,
                    loss=round(pace.loss, 4),
                    learning_rate=report.learning_rate,
                    tokens_per_s=round(pace.tokens_per_s),
                    remaining_s=round(left),
                )

        yield write


class _Pace:
    """Smoothed loss and mean speed of this process."""

    def __init__(self, tokens: int) -> None:
        self._start, self._first = time.monotonic(), tokens
        self.loss = float("nan")
        self.tokens_per_s = self.elapsed_s = 0.0

    def add(self, report: StepReport) -> None:
        is_first = self.loss != self.loss
        before = report.loss if is_first else self.loss
        self.loss = _SMOOTHING * before + (1 - _SMOOTHING) * report.loss
        self.elapsed_s = time.monotonic() - self._start
        self.tokens_per_s = (report.tokens - self._first) / max(self.elapsed_s, 1e-9)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description:10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
