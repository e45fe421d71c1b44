"""Services forked from one process that has imported what they need.

To import torch keeps a core busy for seconds, and a launcher starts six services and more. Its
fork server imports them once; a service is then a fork, which begins at once and shares that
memory. Both ends are here: `fork` in the launcher, `main` in the server. Only on Linux: system
libraries of other systems do not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

SERVICES = (
    "chiasm.orchestrator",
    "chiasm.services.gateway",
    "chiasm.services.vision_encoder",
    "chiasm.services.expert_pool",
    "chiasm.services.decoder",
)

MAX_SERVERS = 2

FORK_TIMEOUT_S = 60.0
"""The first fork waits for the imports."""

_READ_AT_START = (
    *("PYTHON", "LD_", "MALLOC_", "GLIBC_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_"),
    *("OPENBLAS_", "ATEN_", "TORCH", "CUDA_", "TRITON_", "GRPC_", "OTEL_PYTHON_"),
)
"""Beginnings of variables that an interpreter or a library reads when it is loaded: a process that
needs others than the server has is not forked."""

_MAX_MESSAGE_BYTES = 1 << 17
_POLL_S = 0.05


class Forked:
    """A forked process, to be used as a `subprocess.Popen`."""

    def __init__(self, server: ForkServer, pid: int, stdin: IO[bytes]) -> None:
        self.pid = pid
        self.stdin = stdin
        self._server = server
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._server.code(self.pid)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one. Raises subprocess.TimeoutExpired."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() >= end:
                raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0)
            self._server.await_news(_POLL_S)
        return code

    def send_signal(self, signum: int) -> None:
        """Nothing happens when the process is gone."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(
    module: str, flags: Sequence[str], *, env: Mapping[str, str], output: IO[bytes]
) -> Forked | None:
    """`python -m module flags...` in a session of its own, as a fork. stdin is a pipe; stdout and
    stderr go to `output`. None where it has to be started in another way."""
    if sys.platform != "linux" or module not in SERVICES:
        return None
    key = frozenset(_read_at_start(env).items())
    with _lock:
        if key not in _servers and len(_servers) < MAX_SERVERS:
            _servers[key] = ForkServer(env)
        server = _servers.get(key)
    return None if server is None else server.fork(module, flags, env, output)


_lock = threading.Lock()
_servers: dict[frozenset[tuple[str, str]], ForkServer] = {}
"""Of this launcher, by what they have read; mostly one."""


class ForkServer:
    """The launcher's side of its fork server, which ends when the launcher does.

    env: of the server; it forks processes whose environment is as good as the same.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._environment = _read_at_start(env)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "chiasm.forkserver", str(theirs.fileno())],
                # numpy's library has threads from the beginning, and no service multiplies by it.
                env={**env, "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._one_at_a_time = threading.Lock()
        self._news = threading.Condition()
        self._forked: int | None = None
        self._codes: dict[int, int] = {}
        self._is_lost = False
        threading.Thread(target=self._listen, name="forkserver", daemon=True).start()

    def fork(
        self, module: str, flags: Sequence[str], env: Mapping[str, str], output: IO[bytes]
    ) -> Forked | None:
        """See `fork`."""
        if _read_at_start(env) != self._environment:
            return None
        request = json.dumps(
            {"module": module, "flags": [*flags], "env": dict(env), "folder": str(Path.cwd())}
        ).encode()
        if len(request) > _MAX_MESSAGE_BYTES:
            return None
        stdin, ours = os.pipe()
        try:
            with self._one_at_a_time:
                pid = self._ask(request, [stdin, output.fileno()])
        finally:
            os.close(stdin)
        if pid is None:
            os.close(ours)
            return None
        return Forked(self, pid, os.fdopen(ours, "wb"))

    def code(self, pid: int) -> int | None:
        """The exit code of a process; without a server to tell it, that of a kill."""
        with self._news:
            if pid in self._codes or not self._is_lost:
                return self._codes.pop(pid, None)
        return None if _is_running(pid) else -signal.SIGKILL

    def await_news(self, timeout_s: float) -> None:
        with self._news:
            self._news.wait(timeout_s)

    def _ask(self, request: bytes, fds: list[int]) -> int | None:
        with self._news:
            self._forked = None
        try:
            socket.send_fds(self._channel, [request], fds)
        except OSError:
            return None
        with self._news:
            self._news.wait_for(lambda: self._forked is not None or self._is_lost, FORK_TIMEOUT_S)
            if self._forked is None:
                self._is_lost = True
                self._channel.shutdown(socket.SHUT_RDWR)  # it ends then
            return self._forked

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while message := self._channel.recv(_MAX_MESSAGE_BYTES):
                news = json.loads(message)
                with self._news:
                    if "code" in news:
                        self._codes[news["pid"]] = news["code"]
                    else:
                        self._codes.pop(news["pid"], None)  # of a process that nobody asked for
                        self._forked = news["pid"]
                    self._news.notify_all()
        with self._news:
            self._is_lost = True
            self._news.notify_all()


def _read_at_start(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(_READ_AT_START)}


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def main() -> None:
    """The server: forks what it is asked to until its launcher is gone."""
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        for service in SERVICES:
            importlib.import_module(f"{service}.__main__")
            del sys.modules[f"{service}.__main__"]  # it is to be run, not to have been
        if len(os.listdir("/proc/self/task")) > 1:
            return  # threads do not live on in a fork
        gc.freeze()  # what is never looked at again stays shared
        try:
            asked = _serve(channel)
        except BrokenPipeError:  # the launcher is gone
            return
    if asked is not None:
        _become(*asked)


def _serve(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Returns in every fork, with what it is to become; at the end in the server, with None."""
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    while True:
        ready, _, _ = select.select([channel.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _tell_deaths(channel)
        if channel.fileno() in ready:
            message, fds, _, _ = socket.recv_fds(channel, _MAX_MESSAGE_BYTES, 2)
            if not message:
                return None
            if pid := os.fork():
                for fd in fds:
                    os.close(fd)
                channel.send(json.dumps({"pid": pid}).encode())
                continue
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(woken)
            os.close(wake)
            return json.loads(message), fds


def _tell_deaths(channel: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        code = os.waitstatus_to_exitcode(status)
        channel.send(json.dumps({"pid": pid, "code": code}).encode())


def _become(asked: dict[str, Any], fds: list[int]) -> None:
    os.setsid()
    stdin, output = fds
    for fd, standard in ((stdin, 0), (output, 1), (output, 2)):
        os.dup2(fd, standard)
    for fd in fds:
        os.close(fd)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["env"])
    module = asked["module"]
    # What `ps` and `top` show.
    Path("/proc/self/comm").write_text(module.rpartition(".")[2])
    sys.argv = [module, *asked["flags"]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
