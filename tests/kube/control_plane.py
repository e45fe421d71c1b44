"""A real Kubernetes control plane on the loopback: etcd, API server, controllers, scheduler."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config

BUILD_SCRIPT = Path(__file__).with_name("build-control-plane.sh")
PROGRAMS = Path(os.environ.get("KUBEBUILDER_ASSETS", "/opt/kube-1.20.2/bin"))
BUILT = ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
WAIT_S = 60.0


def is_built() -> bool:
    """Whether every program is there; nothing has to be fetched or compiled then."""
    found = all(os.access(PROGRAMS / program, os.X_OK) for program in BUILT)
    return found and all(shutil.which(program) for program in ("etcd", "openssl"))


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    """Polls until the condition holds; fails after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ControlPlane:
    """Starts on entry, ends on exit; `folder` gets keys, logs and etcd's data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._etcd, self._peer, self._port = free_port(), free_port(), free_port()
        self._token = secrets.token_hex(16)
        self.url = f"https://127.0.0.1:{self._port}"
        self.kubeconfig = folder / "kubeconfig"

    def __enter__(self) -> ControlPlane:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @contextmanager
    def without_apiserver(self) -> Iterator[None]:
        """Kills the API server for the time of the block; returns when a new one is ready."""
        self._processes["kube-apiserver"].kill()
        self._processes["kube-apiserver"].wait()
        try:
            yield
        finally:
            self._start_apiserver()

    def api(self, **impersonated: str) -> client.ApiClient:
        """A client with all rights, or with those of the user named by `user=`."""
        api = config.new_client_from_config(str(self.kubeconfig))
        for header, value in impersonated.items():
            api.set_default_header(f"Impersonate-{header.capitalize()}", value)
        return api

    def kubeconfig_for(self, token: str, path: Path) -> Path:
        """Writes a kubeconfig with a bearer token: of a service account, for instance."""
        path.write_text(json.dumps(self._config(token)))
        path.chmod(0o600)
        return path

    def last_lines(self) -> str:
        """The end of every program's log."""
        return "\n".join(
            f"{path.name}: {line[:300]}"
            for path in sorted(self._folder.glob("*.log"))
            for line in path.read_text(errors="replace").splitlines()[-5:]
        )

    def _start(self) -> None:
        (self._folder / "certs").mkdir(parents=True)
        key = self._folder / "certs/sa.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        tokens = self._folder / "tokens.csv"
        tokens.touch(0o600)
        tokens.write_text(f"{self._token},admin,admin,system:masters\n")
        client_url, peer_url = (f"http://127.0.0.1:{port}" for port in (self._etcd, self._peer))
        self._run(
            "etcd",
            f"--data-dir={self._folder / 'etcd'}",
            f"--listen-client-urls={client_url}",
            f"--advertise-client-urls={client_url}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster=default={peer_url}",
            "--unsafe-no-fsync",
        )
        self._start_apiserver()
        self.kubeconfig_for(self._token, self.kubeconfig)
        common = [f"--kubeconfig={self.kubeconfig}", "--bind-address=127.0.0.1", "--port=0"]
        common.append("--leader-elect=false")
        self._run(
            "kube-controller-manager",
            *common,
            f"--secure-port={free_port()}",
            f"--service-account-private-key-file={key}",
            f"--root-ca-file={self._ca}",
            "--use-service-account-credentials",
        )
        self._run("kube-scheduler", *common, f"--secure-port={free_port()}")
        accounts = client.CoreV1Api(self.api())
        wait_until(
            lambda: accounts.list_namespaced_service_account("default").items,
            "the controllers run",
        )

    def _start_apiserver(self) -> None:
        self._run("kube-apiserver", *self._apiserver_flags())
        wait_until(self._is_ready, "the API server is ready")

    @property
    def _ca(self) -> Path:
        """The API server's own certificate chain, which it makes at its first start."""
        return self._folder / "certs/apiserver.crt"

    def _apiserver_flags(self) -> list[str]:
        key = self._folder / "certs/sa.key"
        return [
            f"--etcd-servers=http://127.0.0.1:{self._etcd}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self._port}",
            "--insecure-port=0",
            f"--cert-dir={self._folder / 'certs'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            f"--token-auth-file={self._folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/16",
        ]

    def _config(self, token: str) -> dict[str, Any]:
        ca = base64.b64encode(self._ca.read_bytes()).decode()
        cluster = {"server": self.url, "certificate-authority-data": ca}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }

    def _is_ready(self) -> bool:
        process = self._processes["kube-apiserver"]
        assert process.poll() is None, f"the API server has ended:\n{self.last_lines()}"
        try:
            with urllib3.PoolManager(cert_reqs="CERT_NONE", retries=False) as pool:
                urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
                headers = {"Authorization": f"Bearer {self._token}"}
                answer = pool.request("GET", f"{self.url}/readyz", headers=headers, timeout=2)
        except urllib3.exceptions.HTTPError:
            return False
        return answer.status == 200

    def _run(self, program: str, *flags: str) -> None:
        path = PROGRAMS / program if program in BUILT else program
        with (self._folder / f"{program}.log").open("ab") as log:
            self._processes[program] = subprocess.Popen(
                # It goes with the thread that started it, should this process be killed.
                ["setpriv", "--pdeathsig", "KILL", str(path), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _stop(self) -> None:
        # Those that talk to others first: none of them should see the others go.
        for process in reversed(self._processes.values()):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
