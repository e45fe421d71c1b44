"""The `chiasm` command as people run it, in processes of its own, and within this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from typer.testing import CliRunner

from chiasm.cli import app

CHIASM = (sys.executable, "-m", "chiasm")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 60.0

Completed = subprocess.CompletedProcess[str]


def chiasm(*arguments: str | Path, stdin: str = "") -> Completed:
    """A command that ends by itself."""
    return subprocess.run(
        [*CHIASM, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )


def in_process(*arguments: str | Path, stdin: str = "") -> Completed:
    """The same in this process, which has imported everything. Not for several threads."""
    words = [*map(str, arguments)]
    done = CliRunner().invoke(app, words, input=stdin, catch_exceptions=False)
    return Completed(words, done.exit_code, done.stdout, done.stderr)


@dataclass(frozen=True, kw_only=True)
class Up:
    """A running `chiasm up`."""

    process: subprocess.Popen[str]
    log: IO[str]
    line: str

    @property
    def endpoint(self) -> str:
        return self.line.split()[1]

    @property
    def stderr(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def pids(self) -> set[int]:
        """The services: its children and those of its fork server."""
        children = _children(self.process.pid)
        forks = {pid: _children(pid) for pid in children}
        return {pid for pid in children if not forks[pid]}.union(*forks.values())

    def end(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)


def _children(pid: int) -> set[int]:
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:  # it has ended meanwhile
        return set()
    return {int(child) for child in found.split()}


@contextmanager
def up(model: Path, *flags: str | Path, port: int = 0) -> Iterator[Up]:
    """`chiasm up` once it has printed its first line, or has ended; killed with the block."""
    command = [*CHIASM, "up", "--model", str(model), "--port", str(port), *map(str, flags)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=dict(os.environ)
        )
        try:
            assert process.stdout is not None
            # Should it hang: without it there is no more output to read.
            watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
            watchdog.start()
            line = process.stdout.readline()
            watchdog.cancel()
            yield Up(process=process, log=log, line=line)
        finally:
            process.kill()
            process.wait()
