"""Kinds of other projects that the chart can make objects of, registered without their rules."""

from __future__ import annotations

from kube.control_plane import wait_until
from kubernetes import client

KINDS = {
    "monitoring.coreos.com/v1": ("ServiceMonitor", "PodMonitor", "PrometheusRule"),
    "keda.sh/v1alpha1": ("ScaledObject", "TriggerAuthentication"),
    "cert-manager.io/v1": ("Certificate", "Issuer"),
    "gateway.networking.k8s.io/v1": ("GRPCRoute", "HTTPRoute"),
}


def plural(kind: str) -> str:
    return f"{kind.lower()}s"


def register(api: client.ApiClient) -> None:
    """Registers every kind; what is registered already stays."""
    extensions = client.ApiextensionsV1Api(api)
    for api_version, kinds in KINDS.items():
        for kind in kinds:
            try:
                extensions.create_custom_resource_definition(_definition(api_version, kind))
            except client.ApiException as error:
                if error.status != 409:
                    raise
    wait_until(
        lambda: all(
            any(c.type == "Established" and c.status == "True" for c in d.status.conditions or ())
            for d in extensions.list_custom_resource_definition().items
        ),
        "the kinds are served",
    )


def _definition(api_version: str, kind: str) -> dict[str, object]:
    group, version = api_version.split("/")
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    metadata: dict[str, object] = {"name": f"{plural(kind)}.{group}"}
    if group.endswith("k8s.io"):
        metadata["annotations"] = {"api-approved.kubernetes.io": "unapproved, for tests"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": metadata,
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural(kind),
                "singular": kind.lower(),
            },
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }
