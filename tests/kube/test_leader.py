"""Two orchestrator processes and one Lease: killed, stopped, ended, cut off from the API server."""

from __future__ import annotations

import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from kube.control_plane import ControlPlane, wait_until
from kube.node import local
from kube.proxy import Proxy
from kube.release import topology_at
from kubernetes import client

from chiasm.child import Child

CONTROL = Path(__file__).parents[1] / "control"
PORT = 9000
LEASE = "r-orchestrator"
ELECTION_S = 4
MEMBER_LEASE_MS = 3000


class Orchestrators:
    """Orchestrators behind a service, members that know the service alone, and what they see."""

    def __init__(self, control_plane: ControlPlane, namespace: str, folder: Path) -> None:
        self._control_plane, self._namespace, self._folder = control_plane, namespace, folder
        self._core = client.CoreV1Api(control_plane.api())
        self._kubeconfig = self._account()
        self._leases = client.CoordinationV1Api(control_plane.api())
        self.children: dict[str, Child] = {}
        spec = {"ports": [{"port": PORT}]}
        service = self._core.create_namespaced_service(
            namespace, {"metadata": {"name": LEASE}, "spec": spec}
        )
        self.address = f"{local(service.spec.cluster_ip)}:{PORT}"

    def start(self, name: str, number: int) -> Child:
        """An orchestrator at 10.244.9.`number`, listed in the service once it listens."""
        address = f"10.244.9.{number}"
        flags = ["--bind", f"{local(address)}:{PORT}", "--advertise-host", local(address)]
        flags += ["--namespace", self._namespace, "--election-lease", LEASE]
        flags += ["--election-s", str(ELECTION_S), "--lease-ms", str(MEMBER_LEASE_MS)]
        child = self._spawn(name, "chiasm.orchestrator", flags)
        wait_until(child.address, f"{name} listens")
        return child

    def serve_from(self, *numbers: int) -> None:
        """Makes these the endpoints of the service."""
        addresses = [{"ip": f"10.244.9.{number}"} for number in numbers]
        body = {
            "metadata": {"name": LEASE},
            "subsets": [{"addresses": addresses, "ports": [{"port": PORT}]}],
        }
        try:
            self._core.replace_namespaced_endpoints(LEASE, self._namespace, body)
        except client.ApiException as error:
            if error.status != 404:
                raise
            self._core.create_namespaced_endpoints(self._namespace, body)

    def member(self, name: str) -> Child:
        child = self._spawn(name, "fake_service", ["--orchestrator", self.address])
        wait_until(child.address, f"{name} listens")
        return child

    def leader(self) -> str:
        """Name of the child that holds the lease; empty when none does."""
        try:
            holder = self._lease().holder_identity or ""
        except client.ApiException as error:
            if error.status != 404:
                raise
            return ""
        address = holder.rpartition("@")[2]
        return next((n for n, c in self.children.items() if c.address() == address), "")

    def transitions(self) -> int:
        return int(self._lease().lease_transitions)

    def sees(self, *members: Child) -> bool:
        found = {m.address for m in topology_at(self.address).members if m.is_ready}
        return found == {m.address() for m in members}

    def close(self) -> None:
        for child in self.children.values():
            child.end(10)

    def _lease(self) -> Any:
        return self._leases.read_namespaced_lease(LEASE, self._namespace).spec

    def _spawn(self, name: str, module: str, flags: list[str]) -> Child:
        environment = {
            **os.environ,
            "PYTHONPATH": str(CONTROL),
            "KUBECONFIG": str(self._kubeconfig),
        }
        log = self._folder / f"{name}.log"
        self.children[name] = Child(name, module, flags, env=environment, log_path=log)
        return self.children[name]

    def _account(self) -> Path:
        """A service account that may do with its lease what it must, and nothing else."""
        rules = [
            {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
            {
                "apiGroups": ["coordination.k8s.io"],
                "resources": ["leases"],
                "resourceNames": [LEASE],
                "verbs": ["get", "update"],
            },
        ]
        rights = client.RbacAuthorizationV1Api(self._control_plane.api())
        name, namespace = {"name": LEASE}, self._namespace
        self._core.create_namespaced_service_account(namespace, {"metadata": name})
        rights.create_namespaced_role(namespace, {"metadata": name, "rules": rules})
        subject = {"kind": "ServiceAccount", **name, "namespace": namespace}
        role = {"kind": "Role", **name, "apiGroup": "rbac.authorization.k8s.io"}
        rights.create_namespaced_role_binding(
            namespace, {"metadata": name, "roleRef": role, "subjects": [subject]}
        )
        token = self._core.create_namespaced_service_account_token(
            LEASE, namespace, {"spec": {"expirationSeconds": 3600}}
        )
        return self._control_plane.kubeconfig_for(token.status.token, self._folder / "kubeconfig")


@pytest.fixture
def pair(control_plane: ControlPlane, namespace: str, tmp_path: Path) -> Iterator[Orchestrators]:
    """Two orchestrators behind one service; the first one leads."""
    with ExitStack() as stack:
        running = Orchestrators(control_plane, namespace, tmp_path)
        stack.callback(running.close)
        stack.enter_context(Proxy(control_plane.api(), namespace=namespace))
        running.start("first", 1)
        wait_until(lambda: running.leader() == "first", "the first one leads")
        running.start("second", 2)
        running.serve_from(1, 2)
        yield running


@contextmanager
def undisturbed(pair: Orchestrators) -> Iterator[None]:
    """Asserts that members see one orchestrator after the other, and nobody gives up."""
    yield
    for name, child in pair.children.items():
        assert not re.search("Traceback|rpc_failed", child.log_path.read_text()), name


def leads(child: Child) -> float:
    """What its metrics say."""
    port = re.search(r'"metrics_port": (\d+)', child.log_path.read_text())
    assert port is not None
    host = str(child.address()).partition(":")[0]
    with urllib.request.urlopen(f"http://{host}:{port[1]}/metrics", timeout=10) as answer:
        found = re.search(r"^chiasm_orchestrator_leads (\S+)", answer.read().decode(), re.M)
    assert found is not None
    return float(found[1])


def test_killed_leader(pair: Orchestrators) -> None:
    """One says that it leads. Then the other takes over within the lease; the members find it; a
    successor follows."""
    assert [leads(pair.children[name]) for name in ("first", "second")] == [1.0, 0.0]
    members = [pair.member(f"member-{i}") for i in range(4)]
    wait_until(lambda: pair.sees(*members), "the members are seen")
    with undisturbed(pair):
        pair.children["first"].signal(signal.SIGKILL)
        wait_until(lambda: pair.leader() == "second", "the second one leads")
        pair.serve_from(2)
        wait_until(lambda: pair.sees(*members), "the members are back")
        assert pair.transitions() == 1
        members[0].signal(signal.SIGKILL)
        members.append(pair.member("member-4"))
        wait_until(lambda: pair.sees(*members[1:]), "what changes is seen by the new leader")
        pair.start("third", 3)
        pair.serve_from(2, 3)
        wait_until(lambda: topology_at("127.244.9.3:9000").members, "the third one relays")
        assert topology_at("127.244.9.3:9000").instance_id == topology_at(pair.address).instance_id


def test_leader_that_is_told_to_end_hands_over_at_once(pair: Orchestrators) -> None:
    member = pair.member("member")
    wait_until(lambda: pair.sees(member), "the member is seen")
    with undisturbed(pair):
        assert pair.children["first"].end(20)
        assert pair.children["first"].exit_code == 0
        pair.serve_from(2)
        assert pair.leader() in ("", "second"), pair.children["first"].last_lines(20)
        wait_until(lambda: pair.sees(member), "the member is back")


def test_leader_that_stood_still_ends_when_it_wakes(pair: Orchestrators) -> None:
    first = pair.children["first"]
    first.signal(signal.SIGSTOP)
    wait_until(lambda: pair.leader() == "second", "the second one leads")
    first.signal(signal.SIGCONT)
    wait_until(lambda: first.exit_code is not None, "the first one ends")
    assert first.exit_code == 1
    assert any("lease_lost" in line for line in first.last_lines(50))
    assert pair.leader() == "second"


def test_leader_cut_off_from_the_api_server_ends_and_comes_back(
    control_plane: ControlPlane, pair: Orchestrators
) -> None:
    first, second = pair.children["first"], pair.children["second"]
    with control_plane.without_apiserver():
        wait_until(lambda: first.exit_code is not None, "the first one ends")
        assert second.exit_code is None
    wait_until(lambda: pair.leader() == "second", "the second one leads")
    pair.serve_from(2)
    member = pair.member("member")
    wait_until(lambda: pair.sees(member), "the member is seen")
