"""`chiasm bench serve`: load on a running system, and what it makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer
from rich.console import Console

from chiasm import errors
from chiasm.cli import failures

if TYPE_CHECKING:
    from chiasm.bench.experiment import Outcome
    from chiasm.bench.options import BenchOptions
    from chiasm.bench.sweep import Slot

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it; the results so far are out then."""

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

bench = typer.Typer(name="bench", help="Measures a running system.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Keeps `serve` a command of its own; it would stand for `bench` otherwise."""


@bench.command("serve", add_help_option=False, context_settings=_PASS_ON)
def serve(context: typer.Context) -> None:
    """Sends a workload in a closed or open loop; reports latency, throughput and goodput."""
    from chiasm.bench.options import BenchOptions
    from chiasm.flags import parse_settings

    options = parse_settings(BenchOptions, context.args, prog="chiasm bench serve")
    with failures.reported():
        _serve(options)


def _serve(options: BenchOptions) -> None:
    from chiasm.bench import plots, report

    files = {"--json": options.json_file, "--plot": options.plot, "--records": options.records}
    for flag, path in files.items():
        if path is not None and not path.parent.is_dir():
            raise errors.InvalidArgument(flag, f"there is no folder {str(path.parent)!r}")
    if options.plot is not None:
        plots.require()
    outcome = _measure(options)
    try:
        # First: whoever reads the tables may stop reading, as `head` does.
        _write(options, outcome)
    finally:
        width = None if Console().is_terminal else report.WIDTH
        Console(highlight=False, width=width).print(report.tables(outcome))
    if outcome.is_interrupted:
        raise typer.Exit(INTERRUPTED)
    if outcome.error:
        raise errors.FailedPrecondition(outcome.error)
    if not any(run.summary.succeeded for run in outcome.runs):
        raise typer.Exit(failures.FAILED)


def _write(options: BenchOptions, outcome: Outcome) -> None:
    from chiasm.bench import plots, report

    try:
        if options.json_file is not None:
            document = json.dumps(report.document(options, outcome), indent=1, allow_nan=False)
            options.json_file.write_text(document + "\n", encoding="utf-8")
        if options.plot is not None:
            plots.draw(outcome.runs, options.plot)
    except OSError as error:
        raise errors.FailedPrecondition(str(error)) from None


def _measure(options: BenchOptions) -> Outcome:
    from chiasm.bench.experiment import Experiment, connector

    with contextlib.ExitStack() as stack:
        status = stack.enter_context(Console(stderr=True).status("warming up"))
        experiment = Experiment(
            options,
            connector(options),
            open_records=lambda: _opened(options.records),
            on_run=lambda slot: status.update(_line(slot)),
        )
        stack.enter_context(_first_error())
        try:
            return asyncio.run(experiment.run())
        except KeyboardInterrupt:
            Console(stderr=True).print("interrupted before any request was counted")
            raise typer.Exit(INTERRUPTED) from None


def _line(slot: Slot) -> str:
    return f"repeat {slot.repeat + 1}: {slot.endpoint} {slot.point}"


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[TextIO | None]:
    """By lines: what has been measured survives whatever ends the process."""
    if path is None:
        yield None
        return
    try:
        file = path.open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise errors.InvalidArgument("--records", str(error)) from None
    try:
        yield file
    finally:
        # What a full disk did not take is still in the buffer; that was noted when it was written.
        with contextlib.suppress(OSError):
            file.close()


@contextlib.contextmanager
def _first_error() -> Iterator[None]:
    """Unwraps a domain error from the groups in which tasks wrap it."""
    from chiasm.bench.experiment import first_error

    try:
        yield
    except BaseExceptionGroup as group:
        found = first_error(group)
        if isinstance(found, errors.ChiasmError):
            raise found from None
        raise
