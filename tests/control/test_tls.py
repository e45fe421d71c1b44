"""TLS between real processes: who is let in, who is not, and certificates that are renewed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from control.certificates import Authority, flags
from control.processes import WAIT_S, Spawn, address, wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chiasm import errors
from chiasm.child import Child
from chiasm.flags import parse_settings
from chiasm.orchestrator.config import OrchestratorSettings
from chiasm.services.gateway.config import GatewaySettings
from chiasm.transport import tls
from chiasm.transport.channel import open_blocking_channel
from chiasm.transport.membership import TopologyWatcher
from chiasm.transport.server import LIVE, LOADED
from chiasm.types import TlsFiles

NAME = "chiasm.internal"
SHORT_S = 3.0
"""For what is to fail."""


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.new(tmp_path / "pki")


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    yield
    tls.use(port=None, peers=None)


def check(at: str, files: TlsFiles | None, service: str = "", timeout_s: float = WAIT_S) -> bool:
    """Whether a service is SERVING. Raises grpc.RpcError for one that cannot be asked."""
    with open_blocking_channel(at, max_message_bytes=1 << 20, files=files) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def is_refused(at: str, files: TlsFiles | None) -> bool:
    with pytest.raises(grpc.RpcError) as caught:
        check(at, files, timeout_s=SHORT_S)
    return caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_services_talk_by_mutual_tls_and_nobody_else_gets_in(
    spawn: Spawn, authority: Authority, tmp_path: Path
) -> None:
    files = authority.issue(NAME, name=NAME)
    control = address(spawn("chiasm.orchestrator", *flags(files)))
    member = spawn("fake_service", "--orchestrator", control, *flags(files))
    tls.use(port=None, peers=files)
    watcher = TopologyWatcher(control)
    watcher.start()
    try:
        await watcher.wait_for(
            lambda t: [m.address for m in t.members] == [address(member)],
            timeout_s=WAIT_S,
            what="the member",
        )
    finally:
        await watcher.close()
    tls.use(port=None, peers=None)
    stranger = Authority.new(tmp_path / "stranger").issue(NAME, name=NAME)
    for at in (control, address(member)):
        assert check(at, files)
        assert is_refused(at, None)
        assert is_refused(at, TlsFiles(ca=authority.path, name=NAME))
        assert is_refused(at, TlsFiles(**{**_fields(stranger), "ca": authority.path}))
        assert is_refused(at, TlsFiles(**{**_fields(files), "name": "another.internal"}))


def _fields(files: TlsFiles) -> dict[str, Path | str | None]:
    return {"ca": files.ca, "cert": files.cert, "key": files.key, "name": files.name}


def test_a_member_without_a_certificate_does_not_join(spawn: Spawn, authority: Authority) -> None:
    control = address(spawn("chiasm.orchestrator", *flags(authority.issue(NAME, name=NAME))))
    member = spawn("fake_service", "--orchestrator", control)
    wait_until(lambda: any("not_joined" in line for line in member.last_lines(50)), "a refusal")
    assert not any('"joined"' in line for line in member.last_lines(50))


def test_the_host_counts_where_no_name_is_given(spawn: Spawn, authority: Authority) -> None:
    files = authority.issue("127.0.0.1")
    at = address(spawn("fake_service", *flags(files)))
    assert check(at, files)
    assert is_refused(at.replace("127.0.0.1", "localhost"), files)


def test_a_renewed_certificate_needs_no_restart(spawn: Spawn, authority: Authority) -> None:
    files = authority.issue("old.internal", name="old.internal")
    child = spawn("fake_service", *flags(files))
    at = address(child)
    assert check(at, files)
    (authority.folder / "tls.crt").write_text("half written")
    keeper = authority.issue("old.internal", to="caller", name="old.internal")
    assert check(at, keeper)
    authority.issue("new.internal")
    renewed = authority.issue("new.internal", to="caller", name="new.internal")
    wait_until(lambda: _reaches(at, renewed), "the new name")
    assert child.exit_code is None


def _reaches(at: str, files: TlsFiles) -> bool:
    try:
        return check(at, files, timeout_s=SHORT_S)
    except grpc.RpcError:
        return False


def test_probes_have_a_port_in_plain_text(spawn: Spawn, authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    files = authority.issue("127.0.0.1")
    child = spawn("fake_service", "--health-port", str(port), "--load-s", "4", *flags(files))
    address(child)
    probe = f"127.0.0.1:{port}"
    assert check(probe, None, LIVE)
    assert not check(probe, None)
    wait_until(lambda: check(probe, None) and check(probe, None, LOADED), "serving")
    with grpc.insecure_channel(probe) as channel:
        call = channel.unary_unary("/fake.Service/Anything")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_loaded_and_live_do_not_follow_readiness(spawn: Spawn) -> None:
    """A decoder without experts is loaded and alive, and not ready."""
    control = address(spawn("chiasm.orchestrator"))
    at = address(spawn("fake_service", "--orchestrator", control, "--role", "decoder"))
    wait_until(lambda: check(at, None, LOADED), "loaded")
    assert check(at, None, LIVE)
    assert not check(at, None)


def test_live_stays_through_the_drain(spawn: Spawn) -> None:
    child = spawn("fake_service", "--drain-s", "5")
    at = address(child)
    wait_until(lambda: check(at, None), "serving")
    child.signal(signal.SIGTERM)
    wait_until(lambda: not check(at, None), "draining")
    assert check(at, None, LIVE)


def ends_with(child: Child) -> str:
    wait_until(lambda: child.exit_code is not None, "exit")
    assert child.exit_code == 1
    return "\n".join(child.last_lines(20))


def test_unusable_files_are_one_line(spawn: Spawn, authority: Authority) -> None:
    files = authority.issue("127.0.0.1")
    other = authority.issue("127.0.0.1", to="other")
    shutil.copy(other.key or "", files.key or "")
    assert "tls-cert: " in ends_with(spawn("fake_service", *flags(files)))
    gone = TlsFiles(ca=authority.folder / "gone", cert=other.cert, key=other.key)
    assert "No such file" in ends_with(spawn("fake_service", *flags(gone)))


def test_half_a_configuration_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings(OrchestratorSettings, ["--tls-cert", "a"], prog="chiasm orchestrator")
    assert caught.value.code == 2
    expected = "chiasm orchestrator: --tls-cert, --tls-key and --tls-ca belong together\n"
    assert capsys.readouterr().err == expected


def gateway(**given: str) -> GatewaySettings:
    return GatewaySettings(model=Path("m"), **{key: Path(value) for key, value in given.items()})


def test_a_gateway_shows_clients_its_own_certificate() -> None:
    inside = {"tls_cert": "i.crt", "tls_key": "i.key", "tls_ca": "i.ca"}
    public = {"public_tls_cert": "p.crt", "public_tls_key": "p.key"}
    assert gateway().port_tls is None
    assert gateway(**inside).port_tls == TlsFiles(cert=Path("i.crt"), key=Path("i.key"))
    both = gateway(**inside, **public)
    assert both.port_tls == TlsFiles(cert=Path("p.crt"), key=Path("p.key"))
    assert both.peer_tls is not None
    assert both.peer_tls.ca == Path("i.ca")
    asking = gateway(**public, public_tls_ca="c.ca")
    assert asking.port_tls is not None
    assert asking.port_tls.ca == Path("c.ca")
    assert asking.peer_tls is None
    with pytest.raises(ValueError, match="public-tls-ca"):
        gateway(public_tls_ca="c.ca")


def test_status_shows_the_system_to_who_has_a_certificate(
    spawn: Spawn, authority: Authority
) -> None:
    files = authority.issue(NAME, name=NAME)
    control = address(spawn("chiasm.orchestrator", *flags(files)))
    command = [sys.executable, "-m", "chiasm", "status", "--json", "--endpoint", control]
    env = {key: value for key, value in os.environ.items() if not key.startswith("CHIASM_")}
    end = time.monotonic() + WAIT_S
    done = subprocess.run(
        [*command, *flags(files)], capture_output=True, check=True, timeout=60, env=env
    )
    assert json.loads(done.stdout)["members"] == []
    assert time.monotonic() < end + 60
    refused = subprocess.run(command, capture_output=True, check=False, timeout=60, env=env)
    assert refused.returncode == 1


def test_check_names_the_field(authority: Authority, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_text("no PEM")
    with pytest.raises(errors.InvalidArgument) as caught:
        tls.check(TlsFiles(ca=garbage))
    assert caught.value.field == "tls-ca"
    files = authority.issue("127.0.0.1")
    with pytest.raises(errors.InvalidArgument) as caught:
        tls.check(TlsFiles(cert=garbage, key=files.key))
    assert caught.value.field == "tls-cert"
