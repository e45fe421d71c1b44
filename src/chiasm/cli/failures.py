"""How commands fail: one line on stderr, exit status 2 for a refused request and 1 for the rest."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import typer

from chiasm import errors

REFUSED, FAILED = 2, 1


def line(error: Exception) -> str:
    """What went wrong, on one line that any terminal can show."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.encode("ascii", "backslashreplace").decode()


def exit_status(error: errors.ChiasmError) -> int:
    """REFUSED when repeating the same request cannot help."""
    too_large = isinstance(error, errors.ResourceExhausted) and error.retry_after_s is None
    return REFUSED if too_large or isinstance(error, errors.InvalidArgument) else FAILED


@contextlib.contextmanager
def of_a_start() -> Iterator[None]:
    """Ends the command for a system that does not start, whose error holds lines of a log."""
    try:
        yield
    except errors.Unavailable as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(FAILED) from None


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Ends the command for an error that leaves the block: ours, or the operating system's, as of
    a disk that is full."""
    try:
        yield
    except errors.ChiasmError as error:
        sys.stderr.write(f"error: {line(error)}\n")
        raise typer.Exit(exit_status(error)) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stderr.write(f"error: {line(error)}\n")
        raise typer.Exit(FAILED) from None
