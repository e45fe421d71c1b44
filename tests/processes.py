"""Starting one service as a real process in a test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class ServiceProcess:
    """A running service: where it listens and its process."""

    address: str
    process: subprocess.Popen[bytes]

    def resident_bytes(self, kind: str) -> int:
        """RssAnon or RssFile of the process."""
        return memory_bytes(self.process.pid, kind)


def memory_bytes(pid: int, kind: str) -> int:
    """Of a process: RssAnon or RssFile, or VmHWM, the most ever resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(kind)


@contextmanager
def running(
    module: str, *flags: str, env: dict[str, str] | None = None
) -> Iterator[ServiceProcess]:
    """Runs `python -m module flags` until the block ends; asserts that SIGTERM ends it with 0."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )
        try:
            yield ServiceProcess(address=_announced(process, log), process=process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_TIMEOUT_S) == 0
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _announced(process: subprocess.Popen[bytes], log: object) -> str:
    """The address of the `listening` line."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    end, seen = time.monotonic() + START_TIMEOUT_S, b""
    while not seen.endswith(b"\n"):
        if process.poll() is not None or time.monotonic() > end:
            log.seek(0)  # type: ignore[attr-defined]
            raise AssertionError(f"did not start: {log.read().decode()[-2000:]}")  # type: ignore[attr-defined]
        seen += process.stdout.read() or b""
        time.sleep(0.02)
    return seen.decode().split()[1]
