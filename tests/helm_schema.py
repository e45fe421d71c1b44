"""The schema of the chart's values: helm/chiasm/values.schema.json.

What a service can be told under `settings` comes from its settings class, so that a value that the
program would refuse is refused before anything is installed. `python tests/helm_schema.py` writes
the file anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chiasm.config import ProcessSettings
from chiasm.orchestrator.config import OrchestratorSettings
from chiasm.services.decoder.config import DecoderSettings
from chiasm.services.expert_pool.config import ExpertPoolSettings
from chiasm.services.gateway.config import GatewaySettings
from chiasm.services.vision_encoder.config import EncoderSettings

FILE = Path(__file__).parents[1] / "helm/chiasm/values.schema.json"

Schema = dict[str, Any]

SETTINGS: dict[str, type[ProcessSettings]] = {
    "gateway": GatewaySettings,
    "encoder": EncoderSettings,
    "decoder": DecoderSettings,
    "experts": ExpertPoolSettings,
    "orchestrator": OrchestratorSettings,
}
"""The settings class of each part of the values that has `settings`."""

BY_THE_CHART = frozenset(
    [
        "bind",
        "advertise_host",
        "metrics_host",
        "metrics_port",
        "grace_s",
        "health_port",
        "orchestrator",
        "member_name",
        "model",
        "dtype",
        "device",
        "model_name",
        "modality",
        "shards",
        "tls_cert",
        "tls_key",
        "tls_ca",
        "tls_name",
        "public_tls_cert",
        "public_tls_key",
        "public_tls_ca",
        "api_keys",
        "keyless",
        "namespace",
        "election_lease",
        "scaling",
        "backend",
        "workload_prefix",
        "encoder_min",
        "encoder_max",
        "decoder_min",
        "decoder_max",
        "text_experts_min",
        "text_experts_max",
        "vision_experts_min",
        "vision_experts_max",
    ]
)
"""Settings that the chart fills in from other values."""

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
FREE: Schema = {"type": "object"}
LIST: Schema = {"type": "array"}
OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}
TEXTS: Schema = {"type": "array", "items": TEXT}
TEXT_MAP: Schema = {"type": "object", "additionalProperties": TEXT}
PORTS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 65535}}
DURATION: Schema = {"type": "string", "pattern": "^([0-9]+(ms|h|m|s))+$"}
QUANTITY: Schema = {
    "type": ["string", "integer"],
    "pattern": "^[0-9]+(\\.[0-9]+)?([EPTGMk]i?|m)?$",
}
NAME: Schema = {"type": "string", "pattern": "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"}
# What names of Services begin with.
PREFIX: Schema = {"type": "string", "pattern": "^([a-z]([-a-z0-9]*[a-z0-9])?)?$"}
PERCENT_OR_COUNT: Schema = {"type": ["integer", "string"], "pattern": "^[0-9]+%$", "minimum": 0}


def whole(least: int) -> Schema:
    return {"type": "integer", "minimum": least}


def one_of(*words: str) -> Schema:
    return {"type": "string", "enum": list(words)}


def matching(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


def closed(**properties: Schema) -> Schema:
    """An object with these properties and no others; none of them has to be there."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


def settings_of(cls: type[ProcessSettings]) -> Schema:
    """What a service can be told: the fields of its class that the chart does not fill in."""
    properties: dict[str, Schema] = {}
    for name, found in cls.model_json_schema()["properties"].items():
        if name not in BY_THE_CHART:
            kept = {k: v for k, v in found.items() if k not in ("title", "default", "format")}
            kinds = [k for k in kept.pop("anyOf", []) if k.get("type") != "null"]
            for kind in kinds:
                kept |= {k: v for k, v in kind.items() if k != "format"}
            properties[name] = kept
    return closed(**properties)


IMAGE = closed(
    repository=matching("^[a-z0-9]+([._/:-]+[a-z0-9]+)*$"),
    # A tag that moves would make pods of one release differ.
    tag={"type": "string", "pattern": "^[A-Za-z0-9_.-]*$", "not": {"const": "latest"}},
    digest=matching("^(sha256:[0-9a-f]{64})?$"),
    pullPolicy=one_of("Always", "IfNotPresent", "Never"),
)
RESOURCES = closed(limits=FREE, requests=FREE, claims=LIST)
SECRET_KEY = closed(name=NAME, key=TEXT)
ISSUER = closed(name=TEXT, kind=TEXT, group=TEXT)
PROBE = closed(
    periodSeconds=whole(1),
    timeoutSeconds=whole(1),
    failureThreshold=whole(1),
    initialDelaySeconds=whole(0),
)
PDB = closed(enabled=FLAG, maxUnavailable=PERCENT_OR_COUNT, minAvailable=PERCENT_OR_COUNT)
MONITOR = closed(
    enabled=FLAG,
    labels=TEXT_MAP,
    interval=DURATION,
    scrapeTimeout=DURATION,
    relabelings=OBJECTS,
    metricRelabelings=OBJECTS,
)
KEDA = closed(
    pollingInterval=whole(1),
    cooldownPeriod=whole(0),
    fallbackReplicas={"type": ["integer", "null"], "minimum": 1},
)


def autoscaling(*types: str, least: int) -> Schema:
    properties = {
        "type": one_of(*types),
        "minReplicas": whole(least),
        "maxReplicas": whole(1),
        "metrics": OBJECTS,
        "behavior": closed(scaleUp=FREE, scaleDown=FREE),
    }
    return closed(**properties, **({"keda": KEDA} if "keda-external" in types else {}))


def service(kind: str, *, least: int, **own: Schema) -> Schema:
    """A part of the values that describes one service."""
    return closed(
        replicas=whole(least),
        image=IMAGE,
        settings={"$ref": f"#/definitions/{kind}Settings"},
        env=OBJECTS,
        resources=RESOURCES,
        pdb=PDB,
        nodeSelector=TEXT_MAP,
        tolerations=OBJECTS,
        affinity=FREE,
        topologySpreadConstraints=OBJECTS,
        priorityClassName=NAME,
        runtimeClassName=NAME,
        podAnnotations=TEXT_MAP,
        podLabels=TEXT_MAP,
        extraVolumes=OBJECTS,
        extraVolumeMounts=OBJECTS,
        **own,
    )


def pool(kind: str, *, least: int, **own: Schema) -> Schema:
    """A service that the orchestrator knows how to scale."""
    return service(
        kind,
        least=least,
        device=matching("^(cpu|cuda(:[0-9]+)?)$"),
        drainSeconds=whole(1),
        autoscaling=autoscaling("none", "builtin", "hpa", "keda-external", least=least),
        **own,
    )


def model() -> Schema:
    return closed(
        name=TEXT,
        path=matching("^[A-Za-z0-9_-][A-Za-z0-9._-]*$"),
        dtype=one_of("float32", "bfloat16"),
        volume=closed(
            type=one_of("emptyDir", "pvc", "existingClaim"),
            existingClaim=NAME,
            sizeLimit=QUANTITY,
            pvc=closed(
                size=QUANTITY,
                storageClassName=NAME,
                accessModes={
                    "type": "array",
                    "minItems": 1,
                    "items": one_of("ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"),
                },
                annotations=TEXT_MAP,
                keep=FLAG,
            ),
        ),
        download=closed(
            source=one_of("none", "huggingface", "archive", "command"),
            huggingface=closed(repository=TEXT, revision=TEXT, tokenSecret=SECRET_KEY),
            archive=closed(url=matching("^(https?://.+)?$")),
            command=TEXT,
            checksums=matching("^([0-9a-f]{64} [ *][^\n]+\n?)*$"),
            env=OBJECTS,
            resources=RESOURCES,
        ),
    )


def tls() -> Schema:
    own = {"issuerRef": ISSUER, "duration": DURATION, "renewBefore": DURATION}
    return closed(
        enabled=FLAG,
        existingSecret=NAME,
        name=TEXT,
        certManager=closed(**own),
        gateway=closed(
            existingSecret=NAME,
            certManager=closed(**own, dnsNames=TEXTS),
            clientCASecret=NAME,
        ),
    )


def telemetry() -> dict[str, Schema]:
    return {
        "tracing": closed(
            enabled=FLAG,
            endpoint=matching("^(https?://[^\\s/]+(/\\S*)?)?$"),
            protocol=one_of("grpc", "http/protobuf"),
            sampler=one_of(
                *("always_on", "always_off", "traceidratio"),
                *(f"parentbased_{word}" for word in ("always_on", "always_off", "traceidratio")),
            ),
            samplerArg=TEXT,
            headersSecret=SECRET_KEY,
            resourceAttributes=TEXT_MAP,
        ),
        "metrics": closed(
            serviceMonitor=MONITOR,
            podMonitor=MONITOR,
            rules=closed(enabled=FLAG, labels=TEXT_MAP),
            dashboards=closed(enabled=FLAG, labels=TEXT_MAP, annotations=TEXT_MAP),
        ),
    }


def access() -> dict[str, Schema]:
    return {
        "auth": closed(
            enabled=FLAG,
            keys={"type": "array", "items": matching('^[!-"$-~][!-~]{15,}$')},
            existingSecret=NAME,
            secretKey=matching("^[A-Za-z0-9._-]+$"),
            keyless=one_of("none", "health", "health+reflection"),
        ),
        "networkPolicy": closed(
            enabled=FLAG,
            gatewayFrom=OBJECTS,
            metricsFrom=OBJECTS,
            kedaFrom=OBJECTS,
            dnsPorts=PORTS,
            tracingTo=OBJECTS,
            tracingPorts=PORTS,
            apiServerTo=OBJECTS,
            apiServerPorts=PORTS,
            downloadTo=OBJECTS,
            downloadPorts=PORTS,
            extraGatewayEgress=OBJECTS,
        ),
        "serviceAccount": closed(
            create=FLAG, annotations=TEXT_MAP, name=NAME, orchestratorName=NAME
        ),
        "route": closed(
            enabled=FLAG,
            kind=one_of("GRPCRoute", "HTTPRoute"),
            parentRefs=OBJECTS,
            hostnames=TEXTS,
            labels=TEXT_MAP,
            annotations=TEXT_MAP,
        ),
        "ingress": closed(
            enabled=FLAG, className=NAME, annotations=TEXT_MAP, hosts=TEXTS, tls=OBJECTS
        ),
    }


def gateway() -> Schema:
    return service(
        "gateway",
        least=1,
        drainSeconds=whole(1),
        autoscaling=autoscaling("none", "hpa", least=1),
        service=closed(
            type=one_of("ClusterIP", "NodePort", "LoadBalancer"),
            port={"type": "integer", "minimum": 1, "maximum": 65535},
            annotations=TEXT_MAP,
            loadBalancerSourceRanges=TEXTS,
            loadBalancerClass=TEXT,
            externalTrafficPolicy={"enum": ["", "Cluster", "Local"]},
        ),
    )


def schema() -> Schema:
    """The whole document."""
    shards = {"type": "integer", "minimum": 1, "maximum": 1024}
    experts = {"enabled": FLAG, "shards": shards}
    properties: dict[str, Schema] = {
        "nameOverride": NAME,
        "fullnameOverride": PREFIX,
        "bindAddress": matching("^([0-9.]+|\\[[0-9a-f:]+\\])$"),
        "global": closed(imageRegistry=TEXT, imagePullSecrets=OBJECTS)
        | {
            "additionalProperties": True  # those of a parent chart
        },
        "image": IMAGE,
        "model": model(),
        "tls": tls(),
        **telemetry(),
        **access(),
        "podSecurityContext": FREE,
        "containerSecurityContext": FREE,
        "tmpSizeLimit": QUANTITY,
        "probes": closed(enabled=FLAG, startup=PROBE, readiness=PROBE, liveness=PROBE),
        "gateway": gateway(),
        "encoder": pool("encoder", least=0, enabled=FLAG),
        "decoder": pool("decoder", least=1),
        "expertPools": closed(
            text=pool("experts", least=1, **experts), vision=pool("experts", least=0, **experts)
        ),
        "orchestrator": service("orchestrator", least=1),
        "tests": closed(
            enabled=FLAG,
            image=IMAGE,
            timeoutSeconds=whole(1),
            apiKeySecret=SECRET_KEY,
            caKey=TEXT,
            tlsName=TEXT,
            clientCertSecret=NAME,
        ),
        "extraObjects": {"type": "array", "items": {"type": ["object", "string"]}},
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chiasm chart",
        **closed(**properties),
        "definitions": {f"{kind}Settings": settings_of(cls) for kind, cls in SETTINGS.items()},
    }


def text() -> str:
    """The file."""
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
