"""The chart, rendered."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helm_cli import helm

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/chiasm"
PINNED = Path(__file__).with_name("pinned.yaml")
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
RELEASE, NAMESPACE = "r", "prod"
NAME = f"{RELEASE}-chiasm"
KUBE_VERSION = "1.34.0"

POOLS = ("encoder", "decoder", "text-experts", "vision-experts")

Object = dict[str, Any]
"""An object of Kubernetes."""


def arguments(values: Iterable[Path], sets: Iterable[str]) -> list[str]:
    files = [word for path in tuple(values) or (PINNED,) for word in ("-f", str(path))]
    return [*files, *(word for entry in sets for word in ("--set-json", entry))]


@cache
def manifest(
    *sets: str,
    values: tuple[Path, ...] = (),
    kube: str = KUBE_VERSION,
    major: int = 4,
) -> str:
    """What `helm template` prints; `sets` are KEY=JSON."""
    done = helm(
        *("template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--kube-version", kube),
        *arguments(values, sets),
        major=major,
    )
    return done.stdout


def objects(text: str) -> list[Object]:
    """The objects of a manifest."""
    return [found for found in yaml.load_all(text, yaml.CSafeLoader) if found]


def rendered(*sets: str, values: tuple[Path, ...] = (), **options: Any) -> dict[str, Object]:
    """The objects by `Kind/name`."""
    found = objects(manifest(*sets, values=values, **options))
    named = {f"{o['kind']}/{o['metadata']['name']}": o for o in found}
    assert len(named) == len(found), "two objects of one name"
    return named


def refusal(*sets: str, values: tuple[Path, ...] = ()) -> str:
    """What helm says to values that it must refuse."""
    done = helm(
        *("template", RELEASE, str(CHART), "--namespace", NAMESPACE),
        *arguments(values, sets),
        check=False,
    )
    assert done.returncode != 0, done.stdout
    return done.stderr


def notes(*sets: str) -> str:
    """What helm says after an installation."""
    done = helm(
        *("install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--dry-run=client"),
        *arguments((), sets),
    )
    return done.stdout.partition("NOTES:\n")[2]


def workloads(found: dict[str, Object]) -> dict[str, Object]:
    """Deployments and StatefulSets by component."""
    return {
        o["metadata"]["labels"]["app.kubernetes.io/component"]: o
        for o in found.values()
        if o["kind"] in ("Deployment", "StatefulSet")
    }


def pod_specs(found: dict[str, Object]) -> dict[str, Object]:
    """Specs of everything that becomes a pod, the tests included, by object."""
    return {
        name: o["spec"] if o["kind"] == "Pod" else o["spec"]["template"]["spec"]
        for name, o in found.items()
        if o["kind"] in ("Deployment", "StatefulSet", "Pod")
    }


def container(found: dict[str, Object], component: str) -> Object:
    """The container of a component."""
    (main,) = workloads(found)[component]["spec"]["template"]["spec"]["containers"]
    return dict(main)


def environment(main: Object) -> dict[str, str]:
    """Plain variables of a container."""
    return {e["name"]: e["value"] for e in main["env"] if "value" in e}
