"""Who may talk to whom, and how clients and scrapers find the pods."""

from __future__ import annotations

from typing import Any

import pytest
from helm.rendering import (
    NAME,
    Object,
    notes,
    pod_specs,
    rendered,
    workloads,
)
from helm.starting import EXAMPLE, SETTINGS


def peers(rule: Object, side: str) -> set[str]:
    """Components that a rule names."""
    return {
        peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        for peer in rule.get(side, ())
        if "podSelector" in peer and "namespaceSelector" not in peer
    }


def flows(found: dict[str, Object], side: str, direction: str) -> set[tuple[str, str]]:
    """Pairs of components, the policy's own first."""
    return {
        (policy["metadata"]["name"].removeprefix(f"{NAME}-"), peer)
        for policy in found.values()
        if policy["kind"] == "NetworkPolicy"
        for rule in policy["spec"].get(direction, ())
        for peer in peers(rule, side)
    }


def test_both_ends_of_every_hop_allow_it_and_nothing_else() -> None:
    found = rendered('networkPolicy.gatewayFrom=[{"ipBlock":{"cidr":"10.0.0.0/8"}}]')
    outgoing = flows(found, "to", "egress")
    assert outgoing == {(caller, called) for called, caller in flows(found, "from", "ingress")}
    assert ("test", "gateway") in outgoing
    assert ("decoder", "text-experts") in outgoing
    assert ("gateway", "text-experts") not in outgoing
    assert ("text-experts", "decoder") not in outgoing
    assert {called for caller, called in outgoing if caller == "encoder"} == {"orchestrator"}
    ordered = {called for caller, called in outgoing if caller == "orchestrator"}
    assert ordered == {"orchestrator", "text-experts", "vision-experts"}


def test_everything_else_is_denied() -> None:
    found = rendered()
    deny = found[f"NetworkPolicy/{NAME}-default-deny"]["spec"]
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in deny
    assert "egress" not in deny
    chosen = deny["podSelector"]["matchLabels"].items()
    pods = [o for o in found.values() if o["kind"] in ("Deployment", "StatefulSet", "Pod")]
    for thing in pods:
        template = thing if thing["kind"] == "Pod" else thing["spec"]["template"]
        assert chosen <= template["metadata"]["labels"].items()
    for component in workloads(found):
        allowed = found[f"NetworkPolicy/{NAME}-{component}"]["spec"]["egress"]
        anywhere = [
            {port["port"] for port in rule["ports"]} for rule in allowed if "to" not in rule
        ]
        expected = [{53}] + ([{443, 6443}] if component == "orchestrator" else [{443}])
        assert anywhere == expected
    assert not any(
        key.startswith("NetworkPolicy/") for key in rendered("networkPolicy.enabled=false")
    )


def test_outside_hops_open_where_they_are_used() -> None:
    """Metrics, traces and KEDA."""

    def ports(found: dict[str, Object], component: str, direction: str) -> list[Any]:
        spec = found[f"NetworkPolicy/{NAME}-{component}"]["spec"]
        return [[port["port"] for port in rule["ports"]] for rule in spec[direction]]

    assert ["metrics"] not in ports(rendered(), "decoder", "ingress")
    scraped = rendered("metrics.podMonitor.enabled=true")
    assert ["metrics"] in ports(scraped, "decoder", "ingress")
    for endpoint, port in (("http://c:4317", 4317), ("https://c", 443), ("http://c/v1/", 80)):
        traced = rendered(f'tracing={{"enabled":true,"endpoint":"{endpoint}"}}')
        assert [port] in ports(traced, "gateway", "egress")
    behind = 'tracing={"enabled":true,"endpoint":"http://c"}'
    assert [4317] in ports(
        rendered(behind, "networkPolicy.tracingPorts=[4317]"), "gateway", "egress"
    )
    for url, expected in (("http://s:8080/m.tar", [443, 8080]), ("https://s/m.tar", [443])):
        archive = f'model.download={{"source":"archive","archive":{{"url":"{url}"}}}}'
        assert expected in ports(rendered(archive), "decoder", "egress")
        assert [81] in ports(
            rendered(archive, "networkPolicy.downloadPorts=[81]"), "decoder", "egress"
        )
    keda = rendered(values=EXAMPLE["keda"])[f"NetworkPolicy/{NAME}-orchestrator"]["spec"]
    assert any("namespaceSelector" in peer for peer in keda["ingress"][0]["from"])


def test_clients_get_one_address_and_may_have_all() -> None:
    found = rendered()
    assert "clusterIP" not in found[f"Service/{NAME}-gateway"]["spec"]
    assert found[f"Service/{NAME}-gateway-pods"]["spec"]["clusterIP"] == "None"
    (port,) = found[f"Service/{NAME}-gateway"]["spec"]["ports"]
    assert port["appProtocol"] == "kubernetes.io/h2c"


@pytest.mark.parametrize("kind", ["GRPCRoute", "HTTPRoute"])
def test_routes_lead_to_the_gateway(kind: str) -> None:
    found = rendered(
        f'route={{"enabled":true,"kind":"{kind}","parentRefs":[{{"name":"g"}}],"hostnames":["a"]}}'
    )
    (rule,) = found[f"{kind}/{NAME}"]["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": f"{NAME}-gateway", "port": 8000}]


@pytest.mark.parametrize("kind", ["serviceMonitor", "podMonitor"])
def test_monitors_find_every_pod(kind: str) -> None:
    found = rendered(f'metrics.{kind}={{"enabled":true,"labels":{{"team":"x"}}}}')
    monitor = found[f"{kind[0].upper()}{kind[1:]}/{NAME}"]
    assert monitor["metadata"]["labels"]["team"] == "x"
    chosen = monitor["spec"]["selector"]["matchLabels"].items()
    if kind == "serviceMonitor":
        things = [o for o in found.values() if o["kind"] == "Service"]
        hit = [o for o in things if chosen <= o["metadata"]["labels"].items()]
        covered = {o["spec"]["selector"]["app.kubernetes.io/component"] for o in hit}
        assert len(hit) == len(covered)
        assert all({"metrics"} <= {p["name"] for p in o["spec"]["ports"]} for o in hit)
    else:
        covered = {
            component
            for component, workload in workloads(found).items()
            if chosen <= workload["spec"]["template"]["metadata"]["labels"].items()
        }
    assert covered == set(SETTINGS)


OWN = '"certManager":{"issuerRef":{"name":"web"},"dnsNames":["a.example.com"]}'
GIVEN = '"existingSecret":"web"'


@pytest.mark.parametrize(
    ("tls", "name", "secret"),
    [
        ('{"enabled":true}', f"{NAME}.internal", f"{NAME}-tls"),
        ('{"enabled":true,"existingSecret":"ours","name":"b"}', "b", "ours"),
        (f'{{"enabled":true,"gateway":{{{OWN}}}}}', "a.example.com", f"{NAME}-gateway-tls"),
        (f'{{"gateway":{{{GIVEN}}}}}', "NAME", "web"),
    ],
)
def test_clients_are_told_a_name_that_the_certificate_bears(
    tls: str, name: str, secret: str
) -> None:
    sets = (f"tls={tls}", 'tests.tlsName="NAME"' if GIVEN in tls else "tests.tlsName=null")
    said = notes(*sets)
    assert f"--tls --tls-name {name}\n" in said
    assert f"get secret {secret} " in said
    pods = [spec for key, spec in pod_specs(rendered(*sets)).items() if "test-text" in key]
    words = pods[0]["containers"][0]["args"]
    assert words[words.index("--tls-name") + 1] == name
    assert "--tls" not in notes()
