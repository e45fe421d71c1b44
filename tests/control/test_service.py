"""The life of a service process: load, readiness, drain, and the ways to fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from control.processes import WAIT_S, Spawn, Watch, address, is_running, wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chiasm.child import Child
from chiasm.transport.server import LIVE, LOADED
from chiasm.types import Modality


def events(child: Child) -> list[str]:
    """Names of what it logged."""
    lines = child.log_path.read_text().splitlines()
    return [json.loads(line)["event"] for line in lines if line.startswith("{")]


def is_serving(at: str, service: str = "") -> bool:
    with grpc.insecure_channel(at) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=WAIT_S)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def test_runs_alone_without_an_orchestrator(spawn: Spawn) -> None:
    child = spawn("fake_service")
    at = address(child)
    wait_until(lambda: is_serving(at) and is_serving(at, "fake.Service"), "serving")
    assert child.end(WAIT_S)
    assert child.exit_code == 0
    assert events(child)[-2:] == ["draining", "stopped"]


def test_is_not_serving_while_it_loads_and_sigterm_does_not_wait_for_loading(spawn: Spawn) -> None:
    child = spawn("fake_service", "--load-s", "600")
    assert not is_serving(address(child))
    assert child.end(WAIT_S)
    assert child.exit_code == 0


def test_failed_load_is_one_line_and_exit_code_1(spawn: Spawn) -> None:
    child = spawn("fake_service", "--fail")
    wait_until(lambda: child.exit_code is not None, "exit")
    assert child.exit_code == 1
    (failure,) = [line for line in child.last_lines(100) if "load_failed" in line]
    assert json.loads(failure)["error"] == "weights.bin is not a checkpoint"
    assert not any("Traceback" in line for line in child.last_lines(100))


def test_taken_port_is_one_line_and_exit_code_1(spawn: Spawn) -> None:
    taken = address(spawn("fake_service"))
    child = spawn("fake_service", "--bind", taken)
    wait_until(lambda: child.exit_code is not None, "exit")
    assert child.exit_code == 1
    assert events(child) == ["start_failed"]


async def test_readiness_follows_what_the_service_depends_on(spawn: Spawn, watch: Watch) -> None:
    control = address(spawn("chiasm.orchestrator", "--lease-ms", "300"))
    decoder = address(spawn("fake_service", "--orchestrator", control, "--role", "decoder"))
    watcher = watch(control)
    for _ in range(2):
        pool = spawn("fake_service", "--orchestrator", control)
        await watcher.wait_for(lambda t: bool(t.decoders()), timeout_s=WAIT_S, what="a decoder")
        wait_until(lambda: is_serving(decoder), "decoder serves")
        pool.signal(signal.SIGKILL)
        await watcher.wait_for(
            lambda t: not t.decoders() and not t.covered(Modality.TEXT),
            timeout_s=WAIT_S,
            what="loss",
        )
        wait_until(lambda: not is_serving(decoder), "decoder does not serve")


def test_live_and_ready_end_where_work_does_not_get_on(spawn: Spawn, tmp_path: Path) -> None:
    key = tmp_path / "key"
    child = spawn("fake_service", "--stall-s", "0.2", "--stuck-until", str(key))
    at = address(child)
    wait_until(lambda: not is_serving(at, LIVE) and not is_serving(at), "stalled")
    assert is_serving(at, LOADED)
    key.touch()
    wait_until(lambda: is_serving(at, LIVE) and is_serving(at), "going on")
    assert [e for e in events(child) if e in ("stalled", "going_on")] == ["stalled", "going_on"]
    key.unlink()
    assert child.end(WAIT_S)
    assert child.exit_code == 0


def test_a_stalled_process_still_ends_at_sigterm(spawn: Spawn, tmp_path: Path) -> None:
    """What its drain waits for would never come."""
    never = str(tmp_path / "never")
    child = spawn("fake_service", "--stall-s", "0.2", "--drain-s", "600", "--stuck-until", never)
    at = address(child)
    wait_until(lambda: not is_serving(at, LIVE), "stalled")
    assert child.end(WAIT_S)
    assert child.exit_code == 0


LAUNCHER = """
import os, sys, time
from pathlib import Path
from chiasm.child import Child
child = Child("c", "fake_service", sys.argv[2:], env=dict(os.environ), log_path=Path(sys.argv[1]))
while child.address() is None:
    time.sleep(0.02)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("flags", [[], ["--load-s", "600"]])
def test_child_ends_when_its_launcher_is_killed(tmp_path: Path, flags: list[str]) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "log"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        assert is_running(pid)
        launcher.kill()
    wait_until(lambda: not is_running(pid), "orphan ends")


def test_stop_that_is_ignored_ends_in_sigkill(spawn: Spawn) -> None:
    child = spawn("fake_service")
    address(child)
    child.signal(signal.SIGSTOP)
    assert not child.end(0.2)
    assert child.exit_code == -signal.SIGKILL
