"""Every example renders, with both Helms, into objects that every supported Kubernetes takes."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

import helm_schema
import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml
from helm.rendering import (
    CHART,
    EXAMPLES,
    KUBE_VERSION,
    arguments,
    manifest,
    objects,
    refusal,
)
from helm_cli import binary, helm

VERSIONS = [f"1.{minor}" for minor in range(29, 38)]

VALUES: list[tuple[Path, ...]] = [(), *((path,) for path in EXAMPLES)]
"""The defaults, and every example."""

EVERYTHING = (
    'gateway.service={"type":"LoadBalancer","loadBalancerClass":"x","externalTrafficPolicy":"Local",'
    '"loadBalancerSourceRanges":["10.0.0.0/8"],"annotations":{"a":"b"}}',
    'gateway.podLabels={"a":"b"}',
    'gateway.podAnnotations={"a":"b"}',
    'gateway.priorityClassName="high"',
    'decoder.runtimeClassName="nvidia"',
    'decoder.affinity={"nodeAffinity":{}}',
    'decoder.pdb={"enabled":true,"minAvailable":"50%"}',
    'decoder.topologySpreadConstraints=[{"maxSkew":2,"topologyKey":"topology.kubernetes.io/zone",'
    '"whenUnsatisfiable":"DoNotSchedule"}]',
    'decoder.extraVolumes=[{"name":"shm","emptyDir":{"medium":"Memory"}}]',
    'decoder.extraVolumeMounts=[{"name":"shm","mountPath":"/dev/shm"}]',
    'decoder.env=[{"name":"OMP_NUM_THREADS","value":"4"}]',
    'global={"imageRegistry":"registry.example.com/","imagePullSecrets":[{"name":"pull"}]}',
    f'image.digest="sha256:{"a" * 64}"',
    'ingress={"enabled":true,"className":"nginx","hosts":["a.example.com"],'
    '"annotations":{"nginx.ingress.kubernetes.io/backend-protocol":"GRPC"},'
    '"tls":[{"hosts":["a.example.com"],"secretName":"web"}]}',
    'auth={"enabled":true,"keys":["0123456789abcdef","fedcba9876543210"]}',
    'tls={"enabled":true,"existingSecret":"inside","gateway":{"existingSecret":"outside",'
    '"clientCASecret":"clients"}}',
    'tests={"clientCertSecret":"client","tlsName":"a.example.com"}',
    'tracing={"enabled":true,"endpoint":"https://collector/","protocol":"http/protobuf",'
    '"headersSecret":{"name":"otel"},"resourceAttributes":{"deployment.environment":"prod"}}',
    'metrics={"podMonitor":{"enabled":true,"labels":{"a":"b"},"relabelings":[{"action":"drop"}]},'
    '"rules":{"enabled":true},"dashboards":{"enabled":true,"annotations":{"folder":"chiasm"}}}',
    'networkPolicy={"gatewayFrom":[{"podSelector":{}}],"downloadTo":[{"ipBlock":{"cidr":"10.0.0.0/8"}}],'
    '"extraGatewayEgress":[{"ports":[{"port":443}]}]}',
    'model={"volume":{"type":"pvc","pvc":{"storageClassName":"shared","annotations":{"a":"b"}}},'
    '"download":{"checksums":"'
    + "0"
    * 64
    + '  model.safetensors","env":[{"name":"A","value":"b"}],'
    '"resources":{"limits":{"memory":"1Gi"}},"huggingface":{"tokenSecret":{"name":"hf"}}}}',
    'extraObjects=["apiVersion: v1\\nkind: ConfigMap\\nmetadata: {name: {{ .Release.Name }}-one}",'
    '{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"plain"}}]',
)
"""Values that reach the branches which the examples leave out."""


@pytest.fixture(scope="module", autouse=True)
def fast_schemas() -> None:
    """Each file of schemas is read once, not once for each object."""
    contents = kubernetes_validate.utils.schema_contents
    kubernetes_validate.utils.schema_contents = functools.cache(contents)


def name(values: tuple[Path, ...]) -> str:
    return values[0].stem if values else "defaults"


def check(text: str, version: str) -> int:
    """Checks the objects that Kubernetes itself defines; returns how many."""
    checked = 0
    for found in objects(text):
        assert found["metadata"]["namespace" if found["metadata"].get("namespace") else "name"]
        try:
            kubernetes_validate.validate(found, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            # Of others: their schemas are not here.
            assert re.search(r"keda\.sh|monitoring\.coreos|cert-manager|gateway\.net", str(found))
            continue
        checked += 1
    return checked


@pytest.mark.parametrize("values", VALUES, ids=name)
@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_valid(values: tuple[Path, ...], version: str) -> None:
    assert check(manifest(values=values, kube=f"{version}.0"), version) > 15


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_objects_of_rare_values_are_valid(version: str) -> None:
    assert check(manifest(*EVERYTHING, kube=f"{version}.0"), version) > 30


def test_the_validation_can_fail() -> None:
    broken = manifest('gateway.extraVolumes=[{"name":"a","emptyDyr":{}}]')
    with pytest.raises(kubernetes_validate.ValidationError):
        check(broken, VERSIONS[-1])


@pytest.mark.parametrize("values", VALUES, ids=name)
def test_lint(values: tuple[Path, ...]) -> None:
    helm("lint", "--strict", "--quiet", str(CHART), *arguments(values, ()))


@pytest.mark.parametrize("values", VALUES, ids=name)
def test_both_helms_render_the_same(values: tuple[Path, ...]) -> None:
    assert by_name(manifest(values=values, major=3)) == by_name(manifest(values=values))


def test_both_helms_render_rare_values_the_same() -> None:
    assert by_name(manifest(*EVERYTHING, major=3)) == by_name(manifest(*EVERYTHING))


def by_name(text: str) -> dict[str, object]:
    return {f"{o['kind']}/{o['metadata']['name']}": o for o in objects(text)}


def test_the_schema_is_up_to_date() -> None:
    assert helm_schema.FILE.read_text() == helm_schema.text(), "run: python tests/helm_schema.py"


def test_the_schema_covers_the_defaults_and_every_default_is_in_it() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = helm_schema.schema()
    jsonschema.validate(values, schema)
    assert set(values) == set(schema["properties"])


BAD_VALUES = [
    ("gatway={}", "gatway"),
    ('fullnameOverride="a.b"', "fullnameOverride"),
    ('fullnameOverride="1a"', "fullnameOverride"),
    ('bindAddress="localhost"', "bindAddress"),
    ("networkPolicy.dnsPorts=[0]", "dnsPorts"),
    ('gateway.replicas="two"', "replicas"),
    ("gateway.replicas=0", "replicas"),
    ('gateway.settings={"max_in_fligt":3}', "max_in_fligt"),
    ('gateway.settings={"max_in_flight":0}', "max_in_flight"),
    ('gateway.settings={"bind":"0.0.0.0:1"}', "bind"),
    ('gateway.autoscaling={"type":"keda-external"}', "type"),
    ('gateway.service={"type":"ExternalName"}', "type"),
    ('decoder.settings={"kv_cache_tokens":-1}', "kv_cache_tokens"),
    ('decoder.settings={"micro_batches":"sometimes"}', "micro_batches"),
    ('decoder.device="gpu"', "device"),
    ('decoder.autoscaling={"minReplicas":0}', "minReplicas"),
    ("expertPools.text.shards=0", "shards"),
    ("expertPools.text.replicas=0", "replicas"),
    ("expertPools.audio={}", "audio"),
    ('expertPools.vision.settings={"shards":"0/1"}', "shards"),
    ('orchestrator.settings={"scaling":"builtin"}', "scaling"),
    ('orchestrator.settings={"lease_ms":1}', "lease_ms"),
    ('image.tag="latest"', "tag"),
    ('image.digest="sha256:abc"', "digest"),
    ('image.pullPolicy="Sometimes"', "pullPolicy"),
    ('model.dtype="float16"', "dtype"),
    ('model.path="../etc"', "path"),
    ('model.volume.type="hostPath"', "type"),
    ('model.download.checksums="abc  file"', "checksums"),
    ('model.download.archive.url="ftp://x"', "url"),
    ('tracing.endpoint="collector:4317"', "endpoint"),
    ('tracing.sampler="sometimes"', "sampler"),
    ('auth.keys=["short"]', "keys"),
    ('auth.keyless="all"', "keyless"),
    ('route.kind="TCPRoute"', "kind"),
    ('metrics.podMonitor.interval="often"', "interval"),
    ('probes.liveness={"period":1}', "period"),
    ('encoder.pdb={"maxUnavailable":"half"}', "maxUnavailable"),
    ('networkPolicy.apiServerPorts=["https"]', "apiServerPorts"),
    ('tmpSizeLimit="large"', "tmpSizeLimit"),
]


@pytest.mark.parametrize(("value", "named"), BAD_VALUES)
def test_bad_values_are_refused_by_name(value: str, named: str) -> None:
    said = refusal(value)
    assert "values don't meet the specifications of the schema" in said
    assert named in said


IMPOSSIBLE = [
    (("decoder.settings.colocate=true",), "expertPools.text.enabled"),
    (("expertPools.text.enabled=false",), "nothing can be answered"),
    (('encoder.autoscaling={"type":"hpa","minReplicas":0}',), "an HPA cannot scale to 0"),
    (('decoder.autoscaling={"type":"builtin","minReplicas":5}',), "maxReplicas is less"),
    (
        ('encoder.autoscaling.type="builtin"', 'decoder.autoscaling.type="keda-external"'),
        "the orchestrator scales all pools or none",
    ),
    (
        ('encoder.autoscaling.type="hpa"', 'decoder.autoscaling.type="builtin"'),
        "the orchestrator scales all pools or none",
    ),
    (('expertPools.text.settings={"max_shards":3}',), "cannot hold all 8 shards"),
    (('decoder.settings={"max_running":512}',), "must be more than decoder.settings.max_running"),
    (
        ('decoder.settings={"max_step_tokens":4097}',),
        "is more than expertPools.text.settings.max_dispatch_tokens, 4096",
    ),
    (
        ('expertPools.vision.settings={"max_dispatch_tokens":511}',),
        "is more than expertPools.vision.settings.max_dispatch_tokens",
    ),
    (('orchestrator.settings={"scale_up_at":0.4}',), "scale_down_at must lie below"),
    (('orchestrator.settings={"scale_down_at":0.8}',), "scale_down_at must lie below"),
    (('model.volume.type="existingClaim"', 'model.download.source="none"'), "needs model.volume"),
    (('model.download.source="none"',), "is empty at first"),
    (
        (
            'model.volume={"type":"existingClaim","existingClaim":"a"}',
            f'model.download={{"source":"none","checksums":"{"0" * 64}  a"}}',
        ),
        "nothing is downloaded",
    ),
    (('model.download.huggingface.repository=""',), "huggingface.repository"),
    (('model.download.huggingface.revision="main"',), "main may be another model by then"),
    (('model.download.source="archive"',), "archive.url"),
    (('model.download.source="command"',), "download.command"),
    (("auth.enabled=true",), "auth.existingSecret or auth.keys"),
    (
        ('auth={"enabled":true,"keys":["0123456789abcdef"],"existingSecret":"a"}',),
        "not both",
    ),
    (('auth={"enabled":true,"existingSecret":"a"}',), "tests.apiKeySecret"),
    (
        ('tls.gateway={"existingSecret":"a","certManager":{"issuerRef":{"name":"b"}}}',),
        "not both",
    ),
    (('tls.gateway.certManager.issuerRef={"name":"b"}',), "dnsNames"),
    (('tls.gateway.clientCASecret="a"',), "needs a certificate of the gateway"),
    (('tls={"enabled":true,"gateway":{"clientCASecret":"a"}}',), "tests.clientCertSecret"),
    (
        ("metrics.podMonitor.enabled=true", "metrics.serviceMonitor.enabled=true"),
        "scrape every pod twice",
    ),
    (("tracing.enabled=true",), "tracing.endpoint"),
    (("route.enabled=true",), "route.parentRefs"),
    (("ingress.enabled=true",), "ingress.hosts"),
    (("serviceAccount.create=false",), "orchestratorName must differ"),
    (('tls.gateway.existingSecret="web"',), "set tests.tlsName"),
]


@pytest.mark.parametrize(("sets", "said"), IMPOSSIBLE, ids=lambda given: str(given)[:40])
def test_impossible_mixes_are_refused_in_a_sentence(sets: tuple[str, ...], said: str) -> None:
    assert said in refusal(*sets)


def test_settings_at_the_edge_of_what_fits_together_are_taken() -> None:
    manifest(
        'decoder.settings={"max_step_tokens":4096,"max_running":4095}',
        'orchestrator.settings={"scale_down_at":0.79}',
    )
    manifest('decoder.settings={"max_running":511}', 'orchestrator.settings={"scale_up_at":0.41}')
    manifest('model.download.huggingface.revision="main"', 'model.volume.type="pvc"')


@pytest.mark.parametrize(
    ("release", "begin"),
    [
        ("ernie-4.5", "ernie-4-5-chiasm"),
        ("x" * 40 + ".a", "x" * 36),
        ("a" * 35 + ".b", "a" * 35),
        ("my.chiasm", "my-chiasm"),
    ],
)
def test_names_are_those_that_services_may_have(release: str, begin: str) -> None:
    flags = ("--kube-version", KUBE_VERSION, *arguments((), ()))
    out = helm("template", release, str(CHART), *flags).stdout
    for found in filter(None, yaml.safe_load_all(out)):
        name = found["metadata"]["name"]
        assert name.startswith(f"{begin}-") or name == begin
        assert "." not in name
        assert found["metadata"]["labels"]["app.kubernetes.io/instance"] == release


def test_a_release_named_like_a_number() -> None:
    done = helm("template", "45", str(CHART), "--kube-version", KUBE_VERSION, check=False)
    assert "begin with a letter" in done.stderr
    out = helm(
        *("template", "45", str(CHART), "--kube-version", KUBE_VERSION, *arguments((), ())),
        *("--set", "fullnameOverride=a", "--set-string", "nameOverride=45"),
    ).stdout
    labels = [o["metadata"]["labels"] for o in yaml.safe_load_all(out) if o]
    assert {label["app.kubernetes.io/instance"] for label in labels} == {"45"}
    assert {label["app.kubernetes.io/name"] for label in labels} == {"45"}


def test_probes_can_be_left_out_where_the_kubelet_has_no_grpc() -> None:
    assert "probe:" not in manifest("probes.enabled=false", kube="1.20.2").lower()


def test_a_machine_that_cannot_run_helm_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    with pytest.raises(pytest.skip.Exception, match="x86-64"):
        binary.__wrapped__()
