"""The chart's own pods as real processes: scaled, upgraded, disturbed, with traffic all the while.

The tests share one release and follow each other; each leaves a system that is whole.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from e2e.cluster import Stream, defects
from e2e.disturbed import GREEDY, TEXT, Peace, assert_same, picture_prompt
from kube import crds
from kube.control_plane import ControlPlane, wait_until
from kube.keda import Keda
from kube.node import Node
from kube.proxy import Proxy
from kube.release import WAIT_S, Release
from kubernetes import client

from chiasm.orchestrator.types import Pool
from chiasm.types import Modality

LONG = replace(GREEDY, max_tokens=100)
"""Pods end while it comes."""

ASSETS = Path(__file__).parents[2] / "src/chiasm/assets"


@pytest.fixture(scope="module")
def release(
    control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path
) -> Iterator[Release]:
    """Installed, with everything ready; no process may leave a defect in its log."""
    namespace, logs = "system", tmp_path_factory.mktemp("pods")
    core = client.CoreV1Api(control_plane.api())
    core.create_namespace({"metadata": {"name": namespace}})
    claim_models(core, namespace)
    with ExitStack() as stack:
        node = Node(
            control_plane.api(),
            name="node-1",
            namespace=namespace,
            paths={"/models/tiny": tiny_checkpoint, "/usr/share/chiasm": ASSETS},
            log_dir=logs,
            kubeconfig_for=control_plane.kubeconfig_for,
        )
        stack.enter_context(node)
        stack.enter_context(Proxy(control_plane.api(), namespace=namespace))
        running = Release(control_plane, node)
        running.apply()
        running.wait_complete()
        yield running
    found = defects(logs)
    assert not found, "\n".join(found)
    core.delete_namespace(namespace)


def claim_models(core: client.CoreV1Api, namespace: str) -> None:
    """The claim `models`, bound, as an administrator would have filled it."""
    common = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    volume = {
        **common,
        "capacity": {"storage": "1Gi"},
        "hostPath": {"path": "/models"},
        "claimRef": {"name": "models", "namespace": namespace},
    }
    core.create_persistent_volume({"metadata": {"name": "models"}, "spec": volume})
    claim = {**common, "volumeName": "models", "resources": {"requests": {"storage": "1Gi"}}}
    core.create_namespaced_persistent_volume_claim(
        namespace, {"metadata": {"name": "models"}, "spec": claim}
    )


@pytest.fixture(scope="module")
def peace(release: Release) -> Peace:
    """Answers of the undisturbed system."""
    known = Peace(release.endpoint, LONG)
    for prompt in (TEXT, picture_prompt(1)):
        known.answer(prompt)
    return known


def start(release: Release, *, picture: bool = False) -> Stream:
    """A request under way, by way of the gateway's service."""
    prompt = picture_prompt(1) if picture else TEXT
    return Stream(release.endpoint, prompt, LONG, prompt_logits=True, timeout_s=WAIT_S)


def assert_answers(release: Release, peace: Peace) -> None:
    """Both kinds of requests, answered as ever."""
    running = [start(release), start(release, picture=True)]
    for stream, prompt in zip(running, (TEXT, picture_prompt(1)), strict=True):
        assert_same(stream.result(), peace.answer(prompt))


def test_helm_test_passes(release: Release) -> None:
    assert "Phase:          Succeeded" in release.helm("test", "r", "--timeout", "150s").stdout
    ended = {p.pod_name: p.child for p in release.node.pods.values() if "-test-" in p.pod_name}
    assert set(ended) == {"r-chiasm-test-text", "r-chiasm-test-image"}
    assert all(child is not None and child.exit_code == 0 for child in ended.values())


def test_a_scaled_pool_gets_servers_that_take_shards(release: Release, peace: Peace) -> None:
    running = start(release)
    release.scale(Pool.TEXT_EXPERTS, 3)
    release.wait_members(Pool.TEXT_EXPERTS, 3)
    names = [f"r-chiasm-text-experts-{ordinal}" for ordinal in range(3)]
    assert release.members(Pool.TEXT_EXPERTS) == names
    wait_until(lambda: all(shards(release)[name] for name in names), "each has a shard", WAIT_S)
    release.wait_complete()
    assert_same(running.result(), peace.answer(TEXT))
    assert_answers(release, peace)
    for pod in release.pods("text-experts"):
        assert release.metric(pod, "chiasm_dispatch_tokens_total") > 0

    running = start(release)
    running.wait_tokens(5)
    release.scale(Pool.TEXT_EXPERTS, 1)
    wait_until(lambda: len(release.pods("text-experts")) == 1, "two pods go", WAIT_S)
    release.wait_members(Pool.TEXT_EXPERTS, 1)
    assert_same(running.result(), peace.answer(TEXT))
    assert shards(release)[names[0]] == {0, 1, 2, 3}
    release.wait_complete()


def shards(release: Release) -> dict[str, set[int]]:
    """Shards of each text server, by pod."""
    topology = release.topology()
    return {
        member.member_id.rpartition("-")[0]: set(held.shards)
        for member in topology.members
        if "text-experts" in member.member_id and (held := member.shard_set(Modality.TEXT))
    }


def test_a_killed_leader_is_not_missed(release: Release, peace: Peace) -> None:
    """The other one takes over; the pod comes back and follows; requests notice nothing."""
    first = release.leader()
    assert first is not None
    assert first.child is not None
    running = [start(release), start(release, picture=True)]
    running[0].wait_tokens(5)
    before = release.topology()
    first.child.signal(signal.SIGKILL)
    wait_until(lambda: release.leader() not in (None, first), "the other one leads", WAIT_S)
    assert_same(running[0].result(), peace.answer(TEXT))
    assert_same(running[1].result(), peace.answer(picture_prompt(1)))
    wait_until(
        lambda: (
            release.topology().instance_id not in ("", before.instance_id)
            and {m.member_id for m in release.topology().members}
            == {m.member_id for m in before.members}
        ),
        "the members are back",
        WAIT_S,
    )
    wait_until(lambda: first.restarts == 1, "the pod is started again", WAIT_S)
    assert_answers(release, peace)
    # It acts, too: what the dead one did not live to see.
    release.scale(Pool.TEXT_EXPERTS, 2)
    release.wait_members(Pool.TEXT_EXPERTS, 2)
    wait_until(lambda: all(shards(release).values()), "each has a shard", WAIT_S)
    release.scale(Pool.TEXT_EXPERTS, 1)
    release.wait_members(Pool.TEXT_EXPERTS, 1)
    release.wait_complete()


def test_upgrade_and_rollback_under_traffic(release: Release, peace: Peace) -> None:
    old = {pod.uid for pod in release.pods("orchestrator")}
    running = start(release)
    annotations = 'orchestrator.podAnnotations={"test/again": "1"}'
    release.apply(annotations, "expertPools.text.replicas=2")
    assert_same(running.result(), peace.answer(TEXT))
    release.wait_members(Pool.TEXT_EXPERTS, 2)
    wait_until(
        lambda: (
            len(found := release.pods("orchestrator")) == 2 and not old & {pod.uid for pod in found}
        ),
        "both orchestrators are new",
        WAIT_S,
    )
    release.wait_complete()
    assert_answers(release, peace)
    running = start(release)
    release.helm("rollback", "r", "--wait", "--timeout", "150s")
    release.wait_members(Pool.TEXT_EXPERTS, 1)
    assert_same(running.result(), peace.answer(TEXT))
    release.wait_complete()


QUICK = [
    f"orchestrator.settings.{name}={value}"
    for name, value in {
        "scaling_interval_ms": 500,
        "scale_up_dwell_s": 1,
        "scale_down_dwell_s": 1,
        "scale_down_window_s": 3,
        "warm_up_s": 0.5,
    }.items()
]
"""Decisions within seconds."""

TO_ZERO = '"minReplicas": 0, "maxReplicas": 2'


def scaled_by(kind: str, text_min: int = 1) -> list[str]:
    """Values with which `kind` scales the expert pools, vision down to zero."""
    text = f'"minReplicas": {text_min}, "maxReplicas": 3'
    return [
        f'expertPools.text.autoscaling={{"type": "{kind}", {text}}}',
        f'expertPools.vision.autoscaling={{"type": "{kind}", {TO_ZERO}}}',
        *QUICK,
    ]


def wait_wanted(release: Release, pool: Pool, replicas: int) -> None:
    wait_until(lambda: release.wanted(pool) == replicas, f"{pool} is scaled to {replicas}", WAIT_S)


def wait_pods(release: Release, component: str, count: int) -> None:
    wait_until(lambda: len(release.pods(component)) == count, f"{count} {component}", WAIT_S)


def test_the_orchestrator_scales(
    release: Release, peace: Peace, control_plane: ControlPlane
) -> None:
    """To zero, back when a picture comes, up and down, and through a dead API server."""
    release.apply(*scaled_by("builtin"))
    wait_wanted(release, Pool.VISION_EXPERTS, 0)
    wait_pods(release, "vision-experts", 0)
    assert_same(start(release).result(), peace.answer(TEXT))
    assert_same(start(release, picture=True).result(), peace.answer(picture_prompt(1)))
    wait_wanted(release, Pool.VISION_EXPERTS, 0)

    running = start(release)
    release.apply(*scaled_by("builtin", text_min=2))
    wait_wanted(release, Pool.TEXT_EXPERTS, 2)
    release.wait_members(Pool.TEXT_EXPERTS, 2)
    assert_same(running.result(), peace.answer(TEXT))

    running = start(release)
    release.apply(*scaled_by("builtin", text_min=1))
    wait_wanted(release, Pool.TEXT_EXPERTS, 1)
    wait_pods(release, "text-experts", 1)
    assert release.pods("text-experts")[0].pod_name == "r-chiasm-text-experts-0"
    assert_same(running.result(), peace.answer(TEXT))

    running = start(release)
    with control_plane.without_apiserver():
        assert_same(running.result(), peace.answer(TEXT))
        assert_same(start(release).result(), peace.answer(TEXT))
    assert_same(start(release, picture=True).result(), peace.answer(picture_prompt(1)))


def test_keda_scales(release: Release, peace: Peace, control_plane: ControlPlane) -> None:
    """With KEDA's part played by its documented rules, from the objects of the chart."""
    crds.register(control_plane.api())
    release.apply(*scaled_by("keda-external"))
    with Keda(release):
        wait_wanted(release, Pool.VISION_EXPERTS, 0)
        wait_pods(release, "vision-experts", 0)
        assert_same(start(release, picture=True).result(), peace.answer(picture_prompt(1)))
        wait_wanted(release, Pool.VISION_EXPERTS, 0)
        assert_same(start(release).result(), peace.answer(TEXT))


def test_uninstall_ends_everything(release: Release) -> None:
    """Every process drains and ends by itself, and no object is left behind but the lease."""
    release.apply()
    release.wait_complete()
    last = [pod for pod in release.node.pods.values() if "-test-" not in pod.pod_name]
    release.helm("uninstall", "r", "--wait", "--timeout", "150s")
    wait_until(lambda: all(pod.is_over for pod in last), "the processes end", WAIT_S)
    codes = {
        pod.pod_name: pod.child.exit_code
        for pod in last
        # Their rights go first, and with them the lease.
        if pod.child is not None and "orchestrator" not in pod.pod_name
    }
    assert codes == dict.fromkeys(codes, 0)
    apps = client.AppsV1Api(release.control_plane.api())
    assert not apps.list_namespaced_stateful_set(release.namespace).items
    assert not apps.list_namespaced_deployment(release.namespace).items
