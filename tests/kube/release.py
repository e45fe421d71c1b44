"""The chart on the control plane: installed by helm, run by the fake node."""

from __future__ import annotations

import subprocess
import urllib.request
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
from helm_cli import helm
from kube.control_plane import ControlPlane, wait_until
from kube.node import Node, Pod, local
from kubernetes import client

from chiasm.membership import Topology
from chiasm.orchestrator.types import Pool
from chiasm.transport.topology import topology_from_proto
from chiasm.v1 import control_pb2, control_pb2_grpc

HERE = Path(__file__).parent
CHART = HERE.parents[1] / "helm/chiasm"
NAME = "r"
FULL_NAME = "r-chiasm"
VALUES = ("values-1.20.yaml", "values-small.yaml")
WAIT_S = 120.0
CALL_TIMEOUT_S = 10.0


def topology_at(address: str) -> Topology:
    """What a watcher that comes just now is told; empty while nobody tells it."""
    with grpc.insecure_channel(address) as channel:
        call = control_pb2_grpc.OrchestratorStub(channel).WatchTopology(
            control_pb2.WatchTopologyRequest(), timeout=CALL_TIMEOUT_S
        )
        try:
            return topology_from_proto(next(call))
        except grpc.RpcError:
            return Topology()
        finally:
            call.cancel()


class Release:
    """One release in one namespace, and the node that runs it."""

    def __init__(self, control_plane: ControlPlane, node: Node) -> None:
        self.control_plane, self.node, self.namespace = control_plane, node, node.namespace
        self.core = client.CoreV1Api(control_plane.api())
        self._apps = client.AppsV1Api(control_plane.api())
        self._leases = client.CoordinationV1Api(control_plane.api())

    # Looked up once: services keep their addresses, and the API server may be away.
    @cached_property
    def endpoint(self) -> str:
        """host:port of the gateway."""
        return self._service("gateway")

    @cached_property
    def orchestrator(self) -> str:
        """host:port of the orchestrators."""
        return self._service("orchestrator")

    def helm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        access = ["--kubeconfig", str(self.control_plane.kubeconfig), "--namespace", self.namespace]
        return helm(*arguments, *access)

    def apply(self, *sets: str, wait: bool = True) -> None:
        """Installs or upgrades to the values of this folder and `sets`, each KEY=JSON."""
        files = [word for name in VALUES for word in ("-f", str(HERE / name))]
        changed = [word for entry in sets for word in ("--set-json", entry)]
        waiting = ["--wait", "--timeout", "150s"] if wait else []
        self.helm("upgrade", "--install", NAME, str(CHART), *files, *changed, *waiting)

    def topology(self) -> Topology:
        return topology_at(self.orchestrator)

    def members(self, pool: Pool) -> list[str]:
        """Pods of a pool that take work, as the orchestrator knows them."""
        begin = f"{FULL_NAME}-{pool}-"
        ready = (m.member_id for m in self.topology().members if m.is_ready)
        return sorted(m.rpartition("-")[0] for m in ready if m.startswith(begin))

    def wait_members(self, pool: Pool, count: int) -> None:
        """Waits until a pool has so many members, and all its shards are held by them."""

        def is_so() -> bool:
            modality = pool.modality
            is_covered = modality is None or self.topology().covered(modality)
            return len(self.members(pool)) == count and is_covered

        wait_until(is_so, f"{count} of {pool}", WAIT_S)

    def wait_complete(self) -> None:
        """Waits until every part is there, and every pod ready in the eyes of Kubernetes."""

        def is_so() -> bool:
            pods = self.core.list_namespaced_pod(self.namespace).items
            running = [p for p in pods if p.status.phase == "Running"]
            return self.topology().is_complete() and all(is_ready(pod) for pod in running)

        wait_until(is_so, "every part is ready", WAIT_S)

    def scale(self, pool: Pool, replicas: int) -> None:
        """What `kubectl scale` does."""
        body = {"spec": {"replicas": replicas}}
        name = f"{FULL_NAME}-{pool}"
        self._apps.patch_namespaced_stateful_set_scale(name, self.namespace, body)

    def wanted(self, pool: Pool) -> int:
        """Replicas that the StatefulSet is told to have."""
        found = self._apps.read_namespaced_stateful_set_scale(f"{FULL_NAME}-{pool}", self.namespace)
        return int(found.spec.replicas or 0)

    def pods(self, component: str) -> list[Pod]:
        """Running pods of a component, by name."""
        begin = f"{FULL_NAME}-{component}-"
        return [pod for name, pod in sorted(self.node.pods.items()) if name.startswith(begin)]

    def leader(self) -> Pod | None:
        """The pod that holds the lease; None while none of those running does."""
        lease = self._leases.read_namespaced_lease(f"{FULL_NAME}-orchestrator", self.namespace)
        address = (lease.spec.holder_identity or "").rpartition("@")[2]
        return next((p for p in self.pods("orchestrator") if p.address == address), None)

    def metric(self, pod: Pod, name: str) -> float:
        """Sum of a metric over its labels."""
        url = f"http://{local(pod.ip)}:9090/metrics"
        with urllib.request.urlopen(url, timeout=CALL_TIMEOUT_S) as answer:
            lines = answer.read().decode().splitlines()
        begins = (f"{name} ", f"{name}{{")
        return sum(float(s.rpartition(" ")[2]) for s in lines if s.startswith(begins))

    def _service(self, component: str) -> str:
        spec = self.core.read_namespaced_service(f"{FULL_NAME}-{component}", self.namespace).spec
        return f"{local(spec.cluster_ip)}:{spec.ports[0].port}"


def is_ready(pod: Any) -> bool:
    """Whether Kubernetes counts the pod as ready."""
    return any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions or ())
