"""A node without containers: it runs each pod's program as a local process.

A stand-in for kubelet and kube-proxy on one machine. Pods that the real scheduler binds to the node
are started from their own command, arguments and environment, become ready by their gRPC health,
are started again when they die, and end by SIGTERM when they are deleted. The cluster's addresses
10.x.y.z are 127.x.y.z here, so pods listen on the ports of their containers, and services on
theirs.

Left out: images, volumes, init containers, hooks, resource limits.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import urllib3
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kubernetes import client

from chiasm.child import Child
from chiasm.transport.channel import options
from chiasm.transport.messages import CONTROL_BYTES

POLL_S = 0.2
BEAT_S = 5.0
PROBE_TIMEOUT_S = 2.0
FAILURES = 3
"""Probes in a row that a ready pod must fail to be ready no more, as with the kubelet."""

REMOVE_TIMEOUT_S = 60.0
"""How long the API server may be away while a pod that has ended is to be removed."""

RESTART_S = 0.5
"""Pause before a process that died is started again; the kubelet would double it each time."""

CAPACITY = {
    "cpu": "64",
    "memory": "512Gi",
    "ephemeral-storage": "4Ti",
    "pods": "110",
    "nvidia.com/gpu": "8",
}

Object = dict[str, Any]
"""An object of the API, as JSON."""


def local(address: str) -> str:
    """Where an address of the cluster is on this machine."""
    return f"127.{address.partition('.')[2]}"


def listed(call: Callable[..., Any], *arguments: Any, **options: Any) -> list[Object]:
    """Objects of a list call, as JSON; empty while the API server is away."""
    try:
        answer = call(*arguments, **options, _preload_content=False, _request_timeout=5)
    except (client.ApiException, urllib3.exceptions.HTTPError):
        return []
    return list(json.loads(answer.data)["items"])


class Node:
    """One node, in threads; `pods` are those it runs now, by name.

    paths: folders of containers and what they are here.
    kubeconfig_for: writes the kubeconfig of a service account's token.
    """

    def __init__(
        self,
        api: client.ApiClient,
        *,
        name: str,
        namespace: str,
        paths: Mapping[str, Path],
        log_dir: Path,
        kubeconfig_for: Callable[[str, Path], Path],
    ) -> None:
        self.name, self.namespace, self.paths, self.log_dir = name, namespace, paths, log_dir
        self.core = client.CoreV1Api(api)
        self.kubeconfig_for = kubeconfig_for
        self.pods: dict[str, Pod] = {}
        self.finished: list[Pod] = []
        self.services: dict[str, Object] = {}
        self._ips: Iterator[ipaddress.IPv4Address] = iter(
            ipaddress.IPv4Network("10.244.0.0/16").hosts()
        )
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._beat, self._sync)]

    def __enter__(self) -> Node:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        for pod in self.pods.values():
            pod.delete(grace_s=10)
        for pod in self.pods.values():
            pod.join()
        self.core.delete_node(self.name)

    def next_ip(self) -> str:
        return str(next(self._ips))

    def resolve(self, text: str) -> str:
        """A word of a pod's command line or environment, as it must read on this machine."""
        for name, service in self.services.items():
            address = service["spec"].get("clusterIP", "None")
            if address != "None":
                suffix = rf"(\.{self.namespace}(\.svc(\.cluster\.local\.?)?)?)?"
                text = re.sub(rf"(?<![\w.-]){name}{suffix}(?=:\d)", local(address), text)
        for there, here in self.paths.items():
            text = re.sub(rf"^{re.escape(there)}(?=/|$)", str(here), text)
        return text

    def log(self, prefix: str) -> str:
        """What the processes of the pods with this prefix have written."""
        paths = sorted(self.log_dir.glob(f"{prefix}*.log"))
        return "\n".join(path.read_text(errors="replace") for path in paths)

    def _beat(self) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(client.ApiException, urllib3.exceptions.HTTPError):
                self._report()  # or at the next beat, when the API server is away
            self._stopped.wait(BEAT_S)

    def _report(self) -> None:
        labels = {"kubernetes.io/hostname": self.name}
        try:
            self.core.create_node({"metadata": {"name": self.name, "labels": labels}})
        except client.ApiException as error:
            if error.status != 409:
                raise
        ready = condition("Ready", True) | {"lastHeartbeatTime": now()}
        status = {"capacity": CAPACITY, "allocatable": CAPACITY, "conditions": [ready]}
        self.core.patch_node_status(self.name, {"status": status})

    def _sync(self) -> None:
        while not self._stopped.wait(POLL_S):
            services = listed(self.core.list_namespaced_service, self.namespace)
            self.services = {s["metadata"]["name"]: s for s in services}
            mine = listed(
                self.core.list_namespaced_pod,
                self.namespace,
                field_selector=f"spec.nodeName={self.name}",
            )
            for found in mine:
                name, uid = found["metadata"]["name"], found["metadata"]["uid"]
                known = self.pods.get(name)
                if known is not None and known.uid != uid:
                    continue  # its predecessor is still ending
                if known is None and found.get("status", {}).get("phase") == "Pending":
                    self.pods[name] = known = Pod(self, found)
                    known.start()
                if known is not None and "deletionTimestamp" in found["metadata"]:
                    known.delete(grace_s=found["metadata"].get("deletionGracePeriodSeconds", 0))
            for name, pod in list(self.pods.items()):
                if pod.is_over:
                    self.finished.append(self.pods.pop(name))


class Pod(threading.Thread):
    """One pod and its process."""

    def __init__(self, node: Node, found: Object) -> None:
        name = found["metadata"]["name"]
        super().__init__(name=f"pod-{name}", daemon=True)
        self.pod_name, self.uid = name, found["metadata"]["uid"]
        self.child: Child | None = None
        self.restarts = 0
        self.is_over = False
        self.ip = node.next_ip()
        self._node, self._spec = node, found["spec"]
        self._metadata = found["metadata"]
        self._container = found["spec"]["containers"][0]
        self._deleted = threading.Event()
        self._grace_s = 0.0
        self._told: Object = {}

    def delete(self, *, grace_s: float) -> None:
        """Ends the process by SIGTERM, and after the grace by SIGKILL, and then the pod."""
        self._grace_s = grace_s
        self._deleted.set()

    def run(self) -> None:
        try:
            if self._spec.get("restartPolicy", "Always") == "Always":
                self._serve()
            else:
                self._run_once()
            self._deleted.wait()
            self._remove()
        finally:
            self.is_over = True

    def _serve(self) -> None:
        while not self._deleted.is_set():
            if (child := self._process()) is None:
                return
            self.child, failures = child, FAILURES
            address, service = self._probe
            with grpc.insecure_channel(address, options=options(CONTROL_BYTES)) as channel:
                while child.exit_code is None and not self._deleted.wait(POLL_S):
                    failures = 0 if is_serving(channel, service) else failures + 1
                    self._tell("Running", ready=failures < FAILURES)
            if self._deleted.is_set():
                child.end(max(1.0, self._grace_s))
                return
            self._tell("Running", ready=False)
            self.restarts += 1
            self._deleted.wait(RESTART_S)

    def _run_once(self) -> None:
        if (child := self._process()) is None:
            return
        self.child = child
        self._tell("Running", ready=True)
        while child.exit_code is None and not self._deleted.wait(POLL_S):
            pass
        if child.exit_code is None:
            child.end(max(1.0, self._grace_s))
        self._tell("Failed" if child.exit_code else "Succeeded", ready=False)

    def _process(self) -> Child | None:
        """The process, for which the API server is waited for; None when the pod is deleted."""
        while not self._deleted.is_set():
            with contextlib.suppress(client.ApiException, urllib3.exceptions.HTTPError):
                return self._start()
            self._deleted.wait(RESTART_S)
        return None

    def _start(self) -> Child:
        environment = dict(self._environment())
        words = [*self._container.get("command", []), *self._container.get("args", [])]
        words = [self._node.resolve(expand(word, environment)) for word in words]
        if words and words[0].rpartition("/")[2] == "chiasm":
            words = words[1:]  # the image's entry point, which the command may repeat
        inherited = {
            "PATH": os.environ["PATH"],
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        log = self._node.log_dir / f"{self.pod_name}-{self.uid[:4]}-{self.restarts}.log"
        listening = [word.replace("0.0.0.0", local(self.ip)) for word in words]
        for key, value in environment.items():
            environment[key] = self._node.resolve(value).replace("0.0.0.0", local(self.ip))
        if self._spec.get("automountServiceAccountToken", True):
            environment["KUBECONFIG"] = str(self._kubeconfig())
        return Child(
            self.pod_name, "chiasm", listening, env={**inherited, **environment}, log_path=log
        )

    def _kubeconfig(self) -> Path:
        """Access with the rights of the pod's service account."""
        path = self._node.log_dir / f"{self.pod_name}.kubeconfig"
        account = self._spec.get("serviceAccountName", "default")
        answer = self._node.core.create_namespaced_service_account_token(
            account, self._node.namespace, {"spec": {"expirationSeconds": 3600}}
        )
        return self._node.kubeconfig_for(answer.status.token, path)

    def _environment(self) -> Iterator[tuple[str, str]]:
        known: dict[str, str] = {}
        for source in self._container.get("envFrom", []):
            known.update(self._config_map(source["configMapRef"]["name"]))
        for variable in self._container.get("env", []):
            known[variable["name"]] = expand(self._value(variable), known)
        yield from known.items()

    def _value(self, variable: Object) -> str:
        source = variable.get("valueFrom", {})
        if "configMapKeyRef" in source:
            reference = source["configMapKeyRef"]
            return str(self._config_map(reference["name"])[reference["key"]])
        if "fieldRef" in source:
            fields = {
                "metadata.name": self.pod_name,
                "metadata.namespace": self._node.namespace,
                "metadata.uid": self.uid,
                "spec.nodeName": self._node.name,
                "status.podIP": local(self.ip),
                "status.hostIP": "127.0.0.1",
            }
            path = source["fieldRef"]["fieldPath"]
            if match := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
                return str(self._metadata.get(match[1], {}).get(match[2], ""))
            return str(fields[path])
        if "resourceFieldRef" in source:
            return "1"  # of CPUs, which the pods share here
        assert not source, f"the fake node does not know {source}"
        return str(variable.get("value", ""))

    def _config_map(self, name: str) -> dict[str, str]:
        found = self._node.core.read_namespaced_config_map(name, self._node.namespace)
        return dict(found.data or {})

    @property
    def address(self) -> str:
        """host:port of the gRPC server."""
        ports = self._container.get("ports", [])
        named = [p["containerPort"] for p in ports if p.get("name") == "grpc"]
        return f"{local(self.ip)}:{(named or [p['containerPort'] for p in ports])[0]}"

    @property
    def _probe(self) -> tuple[str, str]:
        """Address and service that readiness is asked of."""
        probe = self._container.get("readinessProbe", {}).get("grpc", {})
        host, _, port = self.address.rpartition(":")
        return f"{host}:{probe.get('port', port)}", probe.get("service", "")

    def _tell(self, phase: str, *, ready: bool) -> None:
        """Publishes the state when it is another one than before."""
        is_over = phase in ("Succeeded", "Failed")
        code = self.child.exit_code if self.child is not None else None
        state: Object = {"running": {"startedAt": self._metadata["creationTimestamp"]}}
        if is_over:
            state = {"terminated": {"exitCode": code, "reason": phase}}
        container = {
            "name": self._container["name"],
            "image": self._container["image"],
            "imageID": "",
            "ready": ready and not is_over,
            "restartCount": self.restarts,
            "started": True,
            "state": state,
        }
        told = {"phase": phase, "podIP": self.ip, "containerStatuses": [container]}
        if told == self._told:
            return
        names = ("Initialized", "PodScheduled", "ContainersReady", "Ready")
        conditions = [condition(n, ready or n in names[:2]) for n in names]
        status = {
            **told,
            "hostIP": "10.0.0.1",
            "podIPs": [{"ip": self.ip}],
            "conditions": conditions,
        }
        try:
            self._node.core.patch_namespaced_pod_status(
                self.pod_name, self._node.namespace, {"status": status}, _request_timeout=5
            )
        except (client.ApiException, urllib3.exceptions.HTTPError):
            return  # told again at the next look
        self._told = told

    def _remove(self) -> None:
        end = time.monotonic() + REMOVE_TIMEOUT_S
        while time.monotonic() < end:
            try:
                self._node.core.delete_namespaced_pod(
                    self.pod_name, self._node.namespace, grace_period_seconds=0, _request_timeout=5
                )
                return
            except client.ApiException as error:
                if error.status == 404:
                    return
            except urllib3.exceptions.HTTPError:
                pass
            time.sleep(POLL_S)


def is_serving(channel: grpc.Channel, service: str) -> bool:
    """The answer to one probe."""
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=PROBE_TIMEOUT_S)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def expand(text: str, environment: Mapping[str, str]) -> str:
    """`$(NAME)` in the way of Kubernetes: unknown names stay as they are."""
    return re.sub(r"\$\((\w+)\)", lambda m: environment.get(m[1], m[0]), text)


def condition(kind: str, status: bool) -> Object:
    """A condition of a node or pod."""
    return {"type": kind, "status": str(status), "lastTransitionTime": now()}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
