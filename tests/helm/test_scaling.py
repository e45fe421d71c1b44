"""Who scales, and with which rights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helm.rendering import (
    NAME,
    NAMESPACE,
    POOLS,
    Object,
    container,
    environment,
    pod_specs,
    rendered,
    workloads,
)
from helm.starting import EXAMPLE, VALUES, name, started

from chiasm.orchestrator.config import OrchestratorSettings
from chiasm.orchestrator.types import Pool


def rules(found: dict[str, Object]) -> list[Any]:
    (role,) = [thing for thing in found.values() if thing["kind"] == "Role"]
    return sorted(
        (rule["resources"], sorted(rule["verbs"]), rule.get("resourceNames"))
        for rule in role["rules"]
    )


LEASE_RULES = [
    (["leases"], ["create"], None),
    (["leases"], ["get", "update"], [f"{NAME}-orchestrator"]),
]
SETS = [f"{NAME}-{pool}" for pool in POOLS]


def test_the_orchestrator_has_no_right_it_does_not_use() -> None:
    assert rules(rendered()) == LEASE_RULES
    scale = ["statefulsets/scale"]
    assert rules(rendered(values=EXAMPLE["builtin"])) == [
        *LEASE_RULES,
        (scale, ["get", "patch"], SETS),
    ]
    assert rules(rendered(values=EXAMPLE["keda"])) == [*LEASE_RULES, (scale, ["get"], SETS)]


@pytest.mark.parametrize("values", VALUES, ids=name)
def test_rights_end_at_the_namespace_and_at_one_account(values: tuple[Path, ...]) -> None:
    found = rendered(values=values)
    assert not any(thing["kind"].startswith("Cluster") for thing in found.values())
    (binding,) = [thing for thing in found.values() if thing["kind"] == "RoleBinding"]
    (subject,) = binding["subjects"]
    specs = pod_specs(found)
    for key, spec in specs.items():
        is_ours = key == f"Deployment/{NAME}-orchestrator"
        assert (spec["serviceAccountName"] == subject["name"]) == is_ours
        assert spec["automountServiceAccountToken"] is is_ours
    lease = environment(container(found, "orchestrator"))["CHIASM_ELECTION_LEASE"]
    assert lease == f"{NAME}-orchestrator"


def test_accounts_of_others() -> None:
    found = rendered('serviceAccount={"create":false,"name":"low","orchestratorName":"high"}')
    assert not any(thing["kind"] == "ServiceAccount" for thing in found.values())
    accounts = {key: spec["serviceAccountName"] for key, spec in pod_specs(found).items()}
    assert accounts.pop(f"Deployment/{NAME}-orchestrator") == "high"
    assert set(accounts.values()) == {"low"}


@pytest.mark.parametrize("example", ["builtin", "keda", "hpa"])
def test_who_scales_owns_the_number_of_replicas(example: str) -> None:
    found = rendered(values=EXAMPLE[example])
    scalers = {"hpa": "HorizontalPodAutoscaler", "keda": "ScaledObject", "builtin": None}
    for component, workload in workloads(found).items():
        key = f"{scalers[example]}/{NAME}-{component}"
        kind = workload["kind"]
        is_scaled = key in found or (
            example == "builtin" and component in ("encoder", "text-experts", "vision-experts")
        )
        assert ("replicas" in workload["spec"]) != is_scaled
        if key in found:
            target = found[key]["spec"]["scaleTargetRef"]
            assert (target["kind"], target["name"]) == (kind, f"{NAME}-{component}")


def test_the_orchestrator_knows_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = started(rendered(values=EXAMPLE["builtin"]), "orchestrator", monkeypatch)
    assert isinstance(settings, OrchestratorSettings)
    assert (settings.scaling, settings.backend, settings.workload_prefix) == (
        *("builtin", "kubernetes"),
        NAME,
    )
    bounds = {p: (c.min_replicas, c.max_replicas) for p, c in settings.pool_configs(2.0).items()}
    assert bounds == {
        Pool.ENCODER: (0, 4),
        Pool.DECODER: (2, 2),  # of type none: as many as its replicas say
        Pool.TEXT_EXPERTS: (2, 8),
        Pool.VISION_EXPERTS: (0, 4),
    }


def test_without_scaling_the_orchestrator_scales_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = started(rendered(), "orchestrator", monkeypatch)
    assert isinstance(settings, OrchestratorSettings)
    assert settings.scaling == "off"


def test_keda_asks_the_orchestrator_about_the_pool() -> None:
    found = rendered("tls.enabled=true", values=EXAMPLE["keda"])
    for pool in POOLS:
        (trigger,) = found[f"ScaledObject/{NAME}-{pool}"]["spec"]["triggers"]
        assert trigger["type"] == "external-push"
        assert trigger["metricType"] == "AverageValue"
        assert "fallback" not in found[f"ScaledObject/{NAME}-{pool}"]["spec"]
        assert trigger["metadata"] == {
            "scalerAddress": f"{NAME}-orchestrator.{NAMESPACE}.svc:9000",
            "pool": pool,
        }
        reference = trigger["authenticationRef"]["name"]
        secrets = found[f"TriggerAuthentication/{reference}"]["spec"]["secretTargetRef"]
        assert {s["parameter"] for s in secrets} == {"caCert", "tlsClientCert", "tlsClientKey"}
    vision = found[f"ScaledObject/{NAME}-vision-experts"]["spec"]
    assert (vision["minReplicaCount"], vision["cooldownPeriod"]) == (0, 600)
    environment_of = environment(container(found, "orchestrator"))
    assert environment_of["CHIASM_SCALING"] == "external"


def test_a_fallback_is_there_for_who_wants_one() -> None:
    found = rendered("decoder.autoscaling.keda.fallbackReplicas=3", values=EXAMPLE["keda"])
    spec = found[f"ScaledObject/{NAME}-decoder"]["spec"]
    assert spec["fallback"] == {"failureThreshold": 3, "replicas": 3}


@pytest.mark.parametrize("example", ["builtin", "keda"])
def test_examples_that_go_to_zero_let_requests_wait_for_a_pod(example: str) -> None:
    found = rendered(values=EXAMPLE[example])
    for component in ("gateway", "decoder"):
        variables = environment(container(found, component))
        assert float(variables["CHIASM_PARK_TIMEOUT_S"]) >= 120


def test_disruption_budgets() -> None:
    found = rendered()
    for component in workloads(found):
        budget = found[f"PodDisruptionBudget/{NAME}-{component}"]
        assert budget["spec"]["maxUnavailable"] == 1
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    off = rendered("decoder.pdb.enabled=false", 'encoder.pdb={"minAvailable":"50%"}')
    assert f"PodDisruptionBudget/{NAME}-decoder" not in off
    assert off[f"PodDisruptionBudget/{NAME}-encoder"]["spec"]["minAvailable"] == "50%"
