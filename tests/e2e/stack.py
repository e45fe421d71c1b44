"""`chiasm up` as a person runs it: the whole system in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from chiasm.client import Client

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0


@contextmanager
def up(model: Path, *flags: str, env: Mapping[str, str] | None = None) -> Iterator[Client]:
    """A client of a running stack; asserts its one line, and that SIGTERM ends it with 0."""
    command = [sys.executable, "-m", "chiasm", "up", "--model", str(model), "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--dtype", "float32", *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **(env or {})},
        )
        try:
            assert process.stdout is not None
            # Should it hang: without it there is no more output to read.
            watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
            watchdog.start()
            line = process.stdout.readline()
            watchdog.cancel()
            log.seek(0)
            assert line.startswith("ready "), log.read()[-4000:]
            with Client(line.split()[1], timeout_s=120) as client:
                yield client
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_TIMEOUT_S) == 0
            assert process.stdout.read() == ""
        finally:
            process.kill()
            process.wait()
