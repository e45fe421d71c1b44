"""Processes that are forked: what they are given, how they end, and what becomes of them without a
server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from control.processes import WAIT_S, is_running, wait_until

from chiasm.child import Child
from chiasm.forkserver import Forked, ForkServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer(os.environ)
    yield server
    server.process.kill()
    server.process.wait()


def forked(server: ForkServer, code: str, log: Path, **env: str) -> Forked:
    """A process that runs some Python; what `timeit` says of it comes after its own output."""
    with log.open("wb") as output:
        process = server.fork("timeit", ["-n1", "-r1", code], {**os.environ, **env}, output)
    assert process is not None
    return process


def test_is_given_what_it_is_to_have(server: ForkServer, tmp_path: Path) -> None:
    code = """
import os, sys
print(os.environ["NEW"], "OLD" in os.environ, os.getcwd(), sys.argv[1:3])
print("leads" if os.getsid(0) == os.getpid() else "follows")
print(sys.stdin.readline(), file=sys.stderr)
print("torch" in sys.modules, open("/proc/self/comm").read())"""
    log = tmp_path / "log"
    process = forked(server, code, log, NEW="a=\u00e4\n", CHIASM_PORT="")
    process.stdin.write(b"given\n")
    process.stdin.close()
    assert process.wait(WAIT_S) == 0
    told = log.read_text()
    assert f"a=\u00e4\n False {Path.cwd()} ['-n1', '-r1']\nleads\n" in told
    assert "given\n" in told
    assert "True timeit\n" in told


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("raise ValueError", 1),
        ("import os; os._exit(7)", 7),
        ("import os; os.abort()", -signal.SIGABRT),
    ],
)
def test_exit_codes(server: ForkServer, code: str, expected: int, tmp_path: Path) -> None:
    process = forked(server, code, tmp_path / "log")
    assert process.wait(WAIT_S) == expected
    assert process.poll() == expected
    process.kill()  # of one that is gone


def test_is_signalled_and_waited_for(server: ForkServer, tmp_path: Path) -> None:
    process = forked(server, "import time; time.sleep(600)", tmp_path / "log")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    process.terminate()
    assert process.wait(WAIT_S) == -signal.SIGTERM


def test_forks_do_not_draw_the_same_numbers(server: ForkServer, tmp_path: Path) -> None:
    code = "import random, uuid; print(random.random(), uuid.uuid4())"
    drawn = []
    for i in range(2):
        log = tmp_path / str(i)
        assert forked(server, code, log).wait(WAIT_S) == 0
        drawn.append(log.read_text().split()[:2])
    assert all(a != b for a, b in zip(*drawn, strict=True))


def test_another_interpreter_is_not_forked(server: ForkServer, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as output:
        for name in ("OMP_NUM_THREADS", "PYTHONPATH", "LD_PRELOAD"):
            assert server.fork("timeit", [], {**os.environ, name: "7"}, output) is None
        assert server.fork("timeit", ["x" * (1 << 20)], os.environ, output) is None


def test_a_server_that_dies_is_missed_by_nobody(tmp_path: Path) -> None:
    server = ForkServer(os.environ)
    process = forked(server, "import time; time.sleep(600)", tmp_path / "log")
    server.process.kill()
    server.process.wait()
    assert process.poll() is None
    with (tmp_path / "log").open("wb") as output:
        assert server.fork("timeit", [], os.environ, output) is None
    process.kill()
    assert process.wait(WAIT_S) == -signal.SIGKILL


LAUNCHER = """
import os, sys, time
from pathlib import Path
from chiasm.child import Child
log = Path(sys.argv[1])
child = Child("o", "chiasm.orchestrator", [], env=dict(os.environ), log_path=log, fork=True)
while child.address() is None:
    time.sleep(0.02)
print(child.pid, open(f"/proc/{child.pid}/comm").read(), flush=True)
time.sleep(600)
"""


def test_a_fork_ends_when_its_launcher_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pid, comm = launcher.stdout.readline().split()
        assert comm == "orchestrator"
        assert is_running(int(pid))
        launcher.kill()
    wait_until(lambda: not is_running(int(pid)), "orphan ends")


def test_a_child_is_forked_and_ends_in_order(tmp_path: Path) -> None:
    child = Child(
        "o", "chiasm.orchestrator", [], env=dict(os.environ), log_path=tmp_path / "log", fork=True
    )
    wait_until(lambda: child.address() is not None, "listens")
    assert Path(f"/proc/{child.pid}/comm").read_text() == "orchestrator\n"
    assert child.end(WAIT_S)
    assert child.exit_code == 0
