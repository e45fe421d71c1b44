"""Child processes of a local launcher: started, heard, ended, and never left behind.

Both ends of one convention are here. The launcher gives a child a pipe as stdin and says so in the
environment; the child takes the end of that pipe for the death of its launcher, however it came,
and ends too. Unlike Linux's PR_SET_PDEATHSIG this works on every Unix and from any thread.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from chiasm import forkserver

WATCH_STDIN = "CHIASM_EXIT_WITH_STDIN"
ORPHAN_GRACE_S = 5.0
"""How long an orphan may drain."""

_ANNOUNCEMENT = "listening "
_TAIL_BYTES = 1 << 14


def exit_with_parent() -> None:
    """In a child: ends the process soon after its launcher is gone. Elsewhere: nothing."""
    if os.environ.pop(WATCH_STDIN, ""):
        threading.Thread(target=_await_orphanhood, name="orphan-watch", daemon=True).start()


def _await_orphanhood() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


class Child:
    """One running `python -m module flags...`; stdout and stderr go to `log_path`.

    fork: where it can be, it is a fork of a process that has imported what services need.
    """

    def __init__(
        self,
        name: str,
        module: str,
        flags: Sequence[str],
        *,
        env: Mapping[str, str],
        log_path: Path,
        fork: bool = False,
    ) -> None:
        self.name = name
        self.log_path = log_path
        # A session of its own: a Ctrl-C in the terminal reaches the launcher alone, which ends its
        # children in order.
        env = {**env, WATCH_STDIN: "1"}
        with log_path.open("wb") as output:
            forked = forkserver.fork(module, flags, env=env, output=output) if fork else None
            self._process = forked or subprocess.Popen(
                [sys.executable, "-m", module, *flags],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._process.poll()

    def address(self) -> str | None:
        """Where it listens, once it has said so."""
        with self.log_path.open(errors="replace") as output:
            for line in output:
                if line.startswith(_ANNOUNCEMENT) and line.endswith("\n"):
                    return line.removeprefix(_ANNOUNCEMENT).strip()
        return None

    def last_lines(self, count: int = 10) -> list[str]:
        """The end of its output."""
        with self.log_path.open("rb") as output:
            output.seek(0, os.SEEK_END)
            output.seek(max(0, output.tell() - _TAIL_BYTES))
            return output.read().decode(errors="replace").splitlines()[-count:]

    def signal(self, signum: signal.Signals) -> None:
        """Sends a signal; nothing happens when the process is gone."""
        self._process.send_signal(signum)

    def end(self, timeout_s: float) -> bool:
        """SIGTERM, then SIGKILL after `timeout_s`; returns whether SIGTERM was enough."""
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
            return True
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False
        finally:
            if self._process.stdin is not None:
                self._process.stdin.close()
