"""The chart's objects on a real API server: all of them accepted whole, and rights that are few."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from helm_cli import helm
from kube import crds
from kube.control_plane import ControlPlane, wait_until
from kube.release import CHART, FULL_NAME, HERE, NAME
from kubernetes import client, dynamic

from chiasm.orchestrator.types import Pool

LEASE = f"{FULL_NAME}-orchestrator"


class Chart:
    """One release without a node: objects, but no pods that run."""

    def __init__(self, control_plane: ControlPlane, namespace: str) -> None:
        self.control_plane, self.namespace = control_plane, namespace
        crds.register(control_plane.api())
        self.objects = dynamic.DynamicClient(control_plane.api())

    def apply(self, *sets: str, values: tuple[str, ...] = ("values-1.20.yaml",)) -> None:
        files = [word for name in values for word in ("-f", str(HERE / name))]
        changed = [word for entry in sets for word in ("--set-json", entry)]
        self.helm("upgrade", "--install", NAME, str(CHART), *files, *changed)

    def helm(self, *arguments: str) -> str:
        access = ["--kubeconfig", str(self.control_plane.kubeconfig), "--namespace", self.namespace]
        return helm(*arguments, *access).stdout

    def manifest(self) -> list[dict[str, Any]]:
        """What helm has sent."""
        return [o for o in yaml.safe_load_all(self.helm("get", "manifest", NAME)) if o]

    def stored(self, sent: dict[str, Any]) -> dict[str, Any] | None:
        """The same object as the API server has it; None where it has none."""
        kind = self.objects.resources.get(api_version=sent["apiVersion"], kind=sent["kind"])
        try:
            found = kind.get(name=sent["metadata"]["name"], namespace=self.namespace)
        except dynamic.exceptions.NotFoundError:
            return None
        return dict(found.to_dict())


@pytest.fixture
def chart(control_plane: ControlPlane, namespace: str) -> Chart:
    return Chart(control_plane, namespace)


def lost(sent: Any, stored: Any, path: str = "") -> list[str]:
    """Paths of what was sent and is not stored; numbers and words of one look are the same."""
    if isinstance(sent, dict):
        if not isinstance(stored, dict):
            return [path] if sent else []
        return [p for k, v in sent.items() for p in lost(v, stored.get(k), f"{path}.{k}")]
    if isinstance(sent, list):
        if not isinstance(stored, list) or len(sent) != len(stored):
            return [path] if sent else []
        pairs = zip(sent, stored, strict=True)
        return [p for i, (a, b) in enumerate(pairs) for p in lost(a, b, f"{path}[{i}]")]
    # The API leaves out what is empty or zero.
    return [] if str(sent) == str(stored) or (not sent and stored is None) else [path]


def test_every_object_is_accepted_whole_and_goes_again(chart: Chart) -> None:
    chart.apply(values=("values-1.20.yaml", "values-everything.yaml"))
    sent = chart.manifest()
    kinds = {f"{o['apiVersion']}/{o['kind']}" for o in sent}
    registered = {f"{version}/{kind}" for version, names in crds.KINDS.items() for kind in names}
    assert registered - kinds == {  # instead of GRPCRoute and ServiceMonitor
        "gateway.networking.k8s.io/v1/HTTPRoute",
        "monitoring.coreos.com/v1/PodMonitor",
    }
    assert {
        "policy/v1beta1/PodDisruptionBudget",
        "autoscaling/v2beta2/HorizontalPodAutoscaler",
        "networking.k8s.io/v1/NetworkPolicy",
        "networking.k8s.io/v1/Ingress",
        "v1/PersistentVolumeClaim",
    } <= kinds
    for sent_object in sent:
        sent_object.pop("stringData", None)  # written only: the API server turns it into data
    found = {f"{o['kind']}/{o['metadata']['name']}": (o, chart.stored(o)) for o in sent}
    assert {name: lost(*pair) for name, pair in found.items() if lost(*pair)} == {}

    chart.helm("uninstall", NAME)
    # The weights are kept: the chart's default.
    kept = {f"PersistentVolumeClaim/{FULL_NAME}-models"}
    wait_until(
        lambda: {n for n, (o, _) in found.items() if chart.stored(o) is not None} == kept,
        "everything else is gone",
    )


def test_upgrades_and_rollbacks_change_what_they_say(chart: Chart) -> None:
    apps = client.AppsV1Api(chart.control_plane.api())

    def text_servers() -> int:
        name = f"{FULL_NAME}-text-experts"
        return int(apps.read_namespaced_stateful_set(name, chart.namespace).spec.replicas)

    chart.apply("expertPools.text.replicas=3")
    assert text_servers() == 3
    chart.apply("expertPools.text.replicas=5", "expertPools.vision.enabled=false")
    assert text_servers() == 5
    names = {s.metadata.name for s in apps.list_namespaced_stateful_set(chart.namespace).items}
    assert f"{FULL_NAME}-vision-experts" not in names
    chart.helm("rollback", NAME, "1")
    assert text_servers() == 3
    names = {s.metadata.name for s in apps.list_namespaced_stateful_set(chart.namespace).items}
    assert f"{FULL_NAME}-vision-experts" in names


BUILTIN = 'expertPools.text.autoscaling={"type": "builtin"}'
EXTERNAL = 'expertPools.text.autoscaling={"type": "keda-external"}'


def test_an_upgrade_leaves_replicas_to_who_scales(chart: Chart) -> None:
    apps = client.AppsV1Api(chart.control_plane.api())
    name = f"{FULL_NAME}-text-experts"
    chart.apply(BUILTIN)
    body = {"spec": {"replicas": 6}}
    apps.patch_namespaced_stateful_set_scale(name, chart.namespace, body)
    chart.apply(BUILTIN, 'expertPools.text.podAnnotations={"new": "yes"}')
    assert apps.read_namespaced_stateful_set(name, chart.namespace).spec.replicas == 6


@pytest.mark.parametrize(
    ("scaling", "verbs"),
    [([], None), ([BUILTIN], ["get", "patch"]), ([EXTERNAL], ["get"])],
    ids=["off", "builtin", "external"],
)
def test_the_orchestrator_may_do_this_and_nothing_else(
    chart: Chart, scaling: list[str], verbs: list[str] | None
) -> None:
    chart.apply(*scaling)
    user = f"system:serviceaccount:{chart.namespace}:{FULL_NAME}-orchestrator"
    expected = [
        (["coordination.k8s.io"], ["leases"], [LEASE], ["get", "update"]),
        (["coordination.k8s.io"], ["leases"], None, ["create"]),
    ]
    if verbs is not None:
        names = [f"{FULL_NAME}-{pool}" for pool in Pool]
        expected.append((["apps"], ["statefulsets/scale"], names, verbs))
    assert rules(chart, user) == expected
    nobody = f"system:serviceaccount:{chart.namespace}:{FULL_NAME}"
    assert rules(chart, nobody) == []


def rules(chart: Chart, user: str) -> list[tuple[Any, ...]]:
    """All rights of a user in the namespace, beyond those that every user has."""
    authorization = client.AuthorizationV1Api(chart.control_plane.api(user=user))
    review = authorization.create_self_subject_rules_review(
        {"spec": {"namespace": chart.namespace}}
    )
    return [
        (r.api_groups, r.resources, r.resource_names, r.verbs)
        for r in review.status.resource_rules
        if r.api_groups != ["authorization.k8s.io"]
    ]


def test_rights_are_enforced(chart: Chart) -> None:
    """By calls, not by what the API server says of them."""
    chart.apply(BUILTIN)
    user = f"system:serviceaccount:{chart.namespace}:{FULL_NAME}-orchestrator"
    api = chart.control_plane.api(user=user)
    apps, core, leases = client.AppsV1Api(api), client.CoreV1Api(api), client.CoordinationV1Api(api)
    mine, body = f"{FULL_NAME}-text-experts", {"spec": {"replicas": 4}}
    apps.patch_namespaced_stateful_set_scale(mine, chart.namespace, body)
    assert apps.read_namespaced_stateful_set_scale(mine, chart.namespace).spec.replicas == 4
    lease = {"metadata": {"name": LEASE}, "spec": {"leaseDurationSeconds": 15}}
    created = leases.create_namespaced_lease(chart.namespace, lease)
    leases.replace_namespaced_lease(LEASE, chart.namespace, created)
    other = {"metadata": {"name": "other"}, "spec": {}}
    leases.create_namespaced_lease(chart.namespace, other)  # create knows no names
    for call in (
        lambda: apps.patch_namespaced_stateful_set(mine, chart.namespace, body),
        lambda: apps.read_namespaced_stateful_set(mine, chart.namespace),
        lambda: apps.patch_namespaced_deployment_scale(
            f"{FULL_NAME}-gateway", chart.namespace, body
        ),
        lambda: apps.read_namespaced_stateful_set_scale(mine, "default"),
        lambda: apps.delete_namespaced_stateful_set(mine, chart.namespace),
        lambda: leases.replace_namespaced_lease("other", chart.namespace, other),
        lambda: leases.delete_namespaced_lease(LEASE, chart.namespace),
        lambda: leases.list_namespaced_lease(chart.namespace),
        lambda: core.list_namespaced_pod(chart.namespace),
        lambda: core.list_namespaced_secret(chart.namespace),
        core.list_node,
    ):
        with pytest.raises(client.ApiException) as refused:
            call()
        assert refused.value.status == 403
