"""What the pods promise: confinement, probes, drains, settings, secrets, the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from helm.rendering import (
    NAME,
    NAMESPACE,
    POOLS,
    RELEASE,
    Object,
    container,
    environment,
    pod_specs,
    rendered,
    workloads,
)
from helm.starting import EXAMPLE, SETTINGS, VALUES, name, started

from chiasm.orchestrator.types import Pool
from chiasm.services.decoder.config import DecoderSettings
from chiasm.services.expert_pool.config import ExpertPoolSettings
from chiasm.services.gateway.config import GatewaySettings
from chiasm.transport.server import LIVE, LOADED

SIGHT = "NVIDIA_VISIBLE_DEVICES"


@pytest.mark.parametrize("values", VALUES, ids=name)
def test_every_process_starts_with_its_environment(
    values: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every variable of the chart is a setting that the program knows, with a value it takes."""
    found = rendered(values=values)
    for component in workloads(found):
        with monkeypatch.context() as patch:
            settings = started(found, component, patch)
        names = {n for n in environment(container(found, component)) if n.startswith("CHIASM_")}
        known = {f"CHIASM_{field.upper()}" for field in SETTINGS[component].model_fields}
        assert names <= known
        assert settings.advertise_host == "10.1.2.3"
        assert settings.bind == f"0.0.0.0:{8000 if component == 'gateway' else 9000}"


def test_values_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rendered(
        'decoder.settings={"kv_cache_tokens":268435456,"speculation":"ngram","park_timeout_s":2.5,'
        '"lane":false}',
        'expertPools.text.device="cuda"',
        "expertPools.text.shards=4",
        'model.name="ernie"',
    )
    with monkeypatch.context() as patch:
        decoder = started(found, "decoder", patch)
        assert isinstance(decoder, DecoderSettings)
        assert (decoder.kv_cache_tokens, decoder.speculation) == (268435456, "ngram")
        assert (decoder.park_timeout_s, decoder.lane, decoder.grace_s) == (2.5, False, 600)
        assert decoder.orchestrator == f"{NAME}-orchestrator.{NAMESPACE}.svc:9000"
        assert decoder.member_name == f"{NAME}-decoder-0"
    with monkeypatch.context() as patch:
        experts = started(found, "text-experts", patch)
        assert isinstance(experts, ExpertPoolSettings)
        assert (experts.modality, experts.device) == ("text", "cuda")
        assert experts.shard_spec.is_auto
        assert experts.shard_spec.num_shards == 4
    with monkeypatch.context() as patch:
        gateway = started(found, "gateway", patch)
        assert isinstance(gateway, GatewaySettings)
        assert gateway.served_name == "ernie"


def test_what_computes_on_cpus_gets_the_threads_it_requests_and_sees_no_gpu() -> None:
    found = rendered(
        'encoder.device="cuda"',
        'expertPools.text.env=[{"name":"OMP_NUM_THREADS","value":"3"}]',
        'expertPools.vision.resources={"requests":{"cpu":null}}',
    )
    given = {
        component: {e["name"]: e for e in container(found, component)["env"]}
        for component in workloads(found)
    }
    requested = {"resource": "requests.cpu", "divisor": "1"}
    assert given["decoder"]["OMP_NUM_THREADS"]["valueFrom"] == {"resourceFieldRef": requested}
    assert given["decoder"]["OMP_WAIT_POLICY"]["value"] == "PASSIVE"
    assert given["text-experts"]["OMP_NUM_THREADS"]["value"] == "3"
    assert "OMP_NUM_THREADS" not in given["vision-experts"], "a request of nothing is no number"
    assert not any("OMP_WAIT_POLICY" in given[other] for other in ("gateway", "encoder"))
    sighted = {other for other, variables in given.items() if SIGHT not in variables}
    assert sighted == {"encoder"}
    assert given["gateway"][SIGHT]["value"] == "void"


@pytest.mark.parametrize("values", VALUES, ids=name)
def test_pods_are_confined(values: tuple[Path, ...]) -> None:
    """The restricted Pod Security Standard, and a root file system that cannot be written."""
    for spec in pod_specs(rendered(values=values)).values():
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] == 10001
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any(key in spec for key in ("hostNetwork", "hostPID", "hostIPC"))
        assert spec["enableServiceLinks"] is False
        kinds = ({*volume} - {"name"} for volume in spec["volumes"])
        assert all(
            kind <= {"emptyDir", "configMap", "secret", "persistentVolumeClaim"} for kind in kinds
        )
        for main in (*spec["containers"], *spec.get("initContainers", ())):
            context = main["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert {"name": "tmp", "mountPath": "/tmp"} in main["volumeMounts"]
            assert not main["image"].endswith(":latest")
            assert ":" in main["image"]


def longest(thing: Object) -> int:
    """A label; that of a StatefulSet's revision adds eleven characters to its name."""
    return 52 if thing["kind"] == "StatefulSet" else 63


@pytest.mark.parametrize("values", VALUES, ids=name)
def test_names_and_labels(values: tuple[Path, ...]) -> None:
    found = rendered(values=values)
    for key, thing in found.items():
        if thing["kind"] == "BackendTLSPolicy":
            continue  # of extraObjects: as it was written
        assert len(thing["metadata"]["name"]) <= longest(thing), key
        assert thing["metadata"]["namespace"] == NAMESPACE
        labels = thing["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == RELEASE
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
    for component, workload in workloads(found).items():
        assert workload["metadata"]["name"] == f"{NAME}-{component}"
        chosen = workload["spec"]["selector"]["matchLabels"]
        assert chosen.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
        assert chosen["app.kubernetes.io/component"] == component


def test_long_release_names_fit() -> None:
    found = rendered('fullnameOverride="a-name-that-is-much-longer-than-what-fits-anywhere"')
    assert all(len(thing["metadata"]["name"]) <= longest(thing) for thing in found.values())


@pytest.mark.parametrize("values", VALUES, ids=name)
def test_probes_ask_what_health_knows(values: tuple[Path, ...]) -> None:
    found = rendered(values=values)
    for component in workloads(found):
        main = container(found, component)
        ports = {port["name"]: port["containerPort"] for port in main["ports"]}
        assert ports["metrics"] == 9090
        probes = {
            kind: main[f"{kind}Probe"]["grpc"] for kind in ("startup", "readiness", "liveness")
        }
        # Neither TLS nor `auth.keyless: none` stands between the kubelet and this port.
        assert {probe["port"] for probe in probes.values()} == {ports["health"]}
        assert probes["startup"]["service"] == LOADED
        assert probes["liveness"]["service"] == LIVE
        # Requests that wait for a decoder must reach a gateway.
        asked = LOADED if component == "gateway" else None
        assert probes["readiness"].get("service") == asked
        assert environment(main)["CHIASM_HEALTH_PORT"] == str(ports["health"])
        patience = main["startupProbe"]
        assert patience["periodSeconds"] * patience["failureThreshold"] >= 1800


def test_probes_can_be_switched_off() -> None:
    for spec in pod_specs(rendered("probes.enabled=false")).values():
        assert not [key for main in spec["containers"] for key in main if key.endswith("Probe")]


@pytest.mark.parametrize("values", VALUES, ids=name)
def test_the_drain_fits_into_the_grace(values: tuple[Path, ...]) -> None:
    found = rendered(values=values)
    for component, workload in workloads(found).items():
        spec = workload["spec"]["template"]["spec"]
        hook = container(found, component).get("lifecycle")
        seconds = float(hook["preStop"]["exec"]["command"][1]) if hook else 0.0
        assert (hook is not None) == (workload["kind"] == "Deployment")
        grace = float(environment(container(found, component)).get("CHIASM_GRACE_S", 1.0))
        assert spec["terminationGracePeriodSeconds"] >= seconds + grace + 5


def test_a_gateway_drains_for_as_long_as_a_request_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway = started(rendered(), "gateway", monkeypatch)
    assert isinstance(gateway, GatewaySettings)
    assert gateway.grace_s >= gateway.default_timeout_s


def test_pools_are_stateful_sets_that_start_at_once() -> None:
    found = rendered()
    for pool in Pool:
        spec = found[f"StatefulSet/{NAME}-{pool}"]["spec"]
        assert spec["podManagementPolicy"] == "Parallel"
        headless = found[f"Service/{spec['serviceName']}"]
        assert headless["spec"]["clusterIP"] == "None"
    assert set(POOLS) == {str(pool) for pool in Pool}


def test_the_model_is_read_only_and_where_the_settings_say() -> None:
    found = rendered()
    for component in workloads(found):
        mounts = {m["name"]: m for m in container(found, component)["volumeMounts"]}
        model = environment(container(found, component)).get("CHIASM_MODEL", "")
        if component == "orchestrator":
            assert "models" not in mounts
            assert not model
            continue
        assert mounts["models"]["readOnly"] is True
        (fetch,) = workloads(found)[component]["spec"]["template"]["spec"]["initContainers"]
        assert environment(fetch)["MODEL"] == model
        weightless = environment(fetch).get("MODEL_WEIGHTS") == "no"
        assert weightless == (component == "gateway")


def test_a_pod_that_downloads_onto_its_node_asks_for_the_room() -> None:
    def requested(component: str, *sets: str) -> object:
        spec = workloads(rendered(*sets))[component]["spec"]["template"]["spec"]
        (fetch,) = spec["initContainers"]
        return fetch.get("resources", {}).get("requests", {}).get("ephemeral-storage")

    assert requested("decoder") == "80Gi"
    assert requested("gateway") is None, "it leaves the weights out"
    assert requested("gateway", 'model.download={"source":"command","command":"x"}') == "80Gi"
    own = 'model.download.resources={"requests":{"ephemeral-storage":"60Gi"}}'
    assert requested("decoder", own) == "60Gi"
    assert requested("decoder", 'model.volume.type="pvc"') is None


@pytest.mark.parametrize("example", [None, "gpu-8", "single-gpu", "builtin", "hpa"])
def test_a_claim_of_the_chart_has_room_for_the_next_model(example: str | None) -> None:
    values = EXAMPLE[example] if example else ()
    found = rendered('model.volume.type="pvc"', values=values)
    size = found[f"PersistentVolumeClaim/{NAME}-models"]["spec"]["resources"]["requests"]["storage"]
    assert int(size.removesuffix("Gi")) >= 2 * 55


@pytest.mark.parametrize("example", ["gpu-8", "single-gpu"])
def test_pods_of_a_volume_for_one_node_go_to_one_node(example: str) -> None:
    found = rendered(values=EXAMPLE[example])
    for component, workload in workloads(found).items():
        template = workload["spec"]["template"]
        labels = template["metadata"]["labels"]
        if component == "orchestrator":
            assert "affinity" not in template["spec"]
            continue
        rules = template["spec"]["affinity"]["podAffinity"]
        (rule,) = rules["requiredDuringSchedulingIgnoredDuringExecution"]
        assert rule["topologyKey"] == "kubernetes.io/hostname"
        named, others = rule["labelSelector"]["matchExpressions"]
        # A pod that matches its own rule may be the first.
        assert labels[named["key"]] in named["values"]
        assert labels[others["key"]] not in others["values"]
        assert "orchestrator" in others["values"], "it may be on any node"


def test_a_claim_that_nobody_fills_is_mounted_for_reading() -> None:
    def claim(*sets: str) -> Object:
        spec = workloads(rendered(*sets))["decoder"]["spec"]["template"]["spec"]
        (volume,) = [v for v in spec["volumes"] if v["name"] == "models"]
        return dict(volume["persistentVolumeClaim"])

    given = 'model.volume={"type":"existingClaim","existingClaim":"a"}'
    assert claim(given, 'model.download.source="none"')["readOnly"] is True
    assert "readOnly" not in claim(given)
    assert "readOnly" not in claim('model.volume.type="pvc"')


def test_another_source_of_the_model_is_another_folder() -> None:
    def folder(*sets: str) -> str:
        return environment(container(rendered(*sets), "decoder"))["CHIASM_MODEL"]

    folders = {
        folder(),
        folder('model.download.huggingface.revision="4444444444444444444444444444444444444444"'),
        folder('model.download={"source":"archive","archive":{"url":"https://x/y.tar"}}'),
        folder(f'model.download.checksums="{"0" * 64}  a"'),
    }
    assert len(folders) == 4


def test_secrets_are_files_of_those_who_need_them() -> None:
    found = rendered(values=EXAMPLE["tls-auth"])
    for component in workloads(found):
        volumes = workloads(found)[component]["spec"]["template"]["spec"]["volumes"]
        secrets = {v["secret"]["secretName"] for v in volumes if "secret" in v}
        own = {"chiasm-keys", f"{NAME}-gateway-tls"} if component == "gateway" else set()
        assert secrets == {f"{NAME}-tls"} | own
        assert all(v["secret"]["defaultMode"] == 0o440 for v in volumes if "secret" in v)
    names = found[f"Certificate/{NAME}-tls"]["spec"]["dnsNames"]
    assert environment(container(found, "decoder"))["CHIASM_TLS_NAME"] in names
    for service in ("orchestrator", "gateway", "gateway-pods"):
        assert f"{NAME}-{service}.{NAMESPACE}.svc" in names
    assert found[f"Issuer/{NAME}-ca"]["spec"] == {"ca": {"secretName": f"{NAME}-ca"}}


def test_keys_of_the_values_are_one_a_line() -> None:
    found = rendered('auth={"enabled":true,"keys":["0123456789abcdef","fedcba9876543210"]}')
    secret = found[f"Secret/{NAME}-api-keys"]["stringData"]
    assert secret["api-keys"].splitlines() == ["0123456789abcdef", "fedcba9876543210"]
    keys = environment(container(found, "gateway"))["CHIASM_API_KEYS"]
    assert keys == "/etc/chiasm/auth/api-keys"
    (test, *_) = [spec for key, spec in pod_specs(found).items() if key.startswith("Pod/")]
    (variable,) = [e for e in test["containers"][0]["env"] if e["name"] == "CHIASM_API_KEY"]
    assert variable["valueFrom"]["secretKeyRef"]["name"] == f"{NAME}-api-keys"


def test_the_tests_send_text_and_a_picture() -> None:
    found = rendered()
    pods = {key: thing for key, thing in found.items() if thing["kind"] == "Pod"}
    assert set(pods) == {f"Pod/{NAME}-test-text", f"Pod/{NAME}-test-image"}
    for key, pod in pods.items():
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        assert pod["spec"]["restartPolicy"] == "Never"
        words = pod["spec"]["containers"][0]["args"]
        assert words[:3] == ["generate", "--endpoint", f"{NAME}-gateway.{NAMESPACE}.svc:8000"]
        assert ("--image" in words) == key.endswith("image")
    assert not [key for key in rendered("tests.enabled=false") if key.startswith("Pod/")]


def test_tracing_reaches_every_process() -> None:
    found = rendered(values=EXAMPLE["tls-auth"])
    for component in workloads(found):
        variables = environment(container(found, component))
        assert variables["OTEL_EXPORTER_OTLP_ENDPOINT"].startswith("http://otel-collector")
        assert "k8s.pod.name=$(POD_NAME)" in variables["OTEL_RESOURCE_ATTRIBUTES"]
    assert not any("OTEL" in key for key in environment(container(rendered(), "decoder")))


@pytest.mark.parametrize(
    ("sets", "image"),
    [
        ((), "chiasm:0.1.0"),
        (('image.tag="2.0"',), "chiasm:2.0"),
        (('decoder.image.tag="cuda"',), "chiasm:cuda"),
        (('global.imageRegistry="reg:5000/t/"', 'image.repository="c"'), "reg:5000/t/c:0.1.0"),
        ((f'image.digest="sha256:{"b" * 64}"',), f"chiasm@sha256:{'b' * 64}"),
    ],
)
def test_images(sets: tuple[str, ...], image: str) -> None:
    assert container(rendered(*sets), "decoder")["image"] == image
