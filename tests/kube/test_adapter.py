"""The adapter against a real API server: scales, conflicts, outages, the lease."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from kube.control_plane import ControlPlane, wait_until
from kubernetes import client

from chiasm import errors
from chiasm.membership import MemberInfo, Role
from chiasm.orchestrator import kubernetes as adapter
from chiasm.orchestrator.election import Candidate, Lease
from chiasm.orchestrator.kubernetes import KubernetesLease, StatefulSets
from chiasm.orchestrator.types import Pool

WAIT_S = 30.0
LEASE_S = 2.0


def stateful_set(name: str, replicas: int) -> dict[str, Any]:
    labels = {"app": name}
    container = {"name": "main", "image": "none"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    spec = {
        "replicas": replicas,
        "serviceName": name,
        "selector": {"matchLabels": labels},
        "template": template,
    }
    return {"metadata": {"name": name}, "spec": spec}


@pytest.fixture
def apps(control_plane: ControlPlane, namespace: str) -> client.AppsV1Api:
    """All rights, in a namespace with two pools: 2 text servers, no vision server."""
    apps = client.AppsV1Api(control_plane.api())
    for pool, replicas in ((Pool.TEXT_EXPERTS, 2), (Pool.VISION_EXPERTS, 0)):
        apps.create_namespaced_stateful_set(namespace, stateful_set(f"r-{pool}", replicas))
    return apps


class Backend(StatefulSets):
    """The adapter, with something that happens before its next write."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self.leads = True
        self.writes = 0
        self.before_write: Any = lambda: None
        super().__init__(api, namespace=namespace, prefix="r", may_act=lambda: self.leads)

    async def _write(self, pool: Pool, replicas: int, *, version: str) -> bool:
        self.writes += 1
        before, self.before_write = self.before_write, lambda: None
        before()
        return await super()._write(pool, replicas, version=version)


@pytest.fixture
def backend(control_plane: ControlPlane, namespace: str, apps: client.AppsV1Api) -> Backend:
    return Backend(control_plane.api(), namespace)


def wanted(apps: client.AppsV1Api, namespace: str, pool: Pool) -> int:
    return int(apps.read_namespaced_stateful_set(f"r-{pool}", namespace).spec.replicas)


async def test_reads_and_sets_the_wanted_replicas(
    backend: Backend, apps: client.AppsV1Api, namespace: str
) -> None:
    assert await backend.replicas() == {Pool.TEXT_EXPERTS: 2, Pool.VISION_EXPERTS: 0}
    for pool, replicas in (
        (Pool.TEXT_EXPERTS, 5),
        (Pool.VISION_EXPERTS, 1),
        (Pool.TEXT_EXPERTS, 3),
        (Pool.VISION_EXPERTS, 0),
    ):
        await backend.scale(pool, replicas)
        assert wanted(apps, namespace, pool) == replicas
        assert (await backend.replicas())[pool] == replicas
    with pytest.raises(errors.NotFound, match="r-decoder"):
        await backend.scale(Pool.DECODER, 1)


async def test_a_change_of_something_else_is_read_again(
    backend: Backend, apps: client.AppsV1Api, namespace: str
) -> None:
    await backend.replicas()
    patch = {"metadata": {"annotations": {"touched": "yes"}}}
    name = f"r-{Pool.TEXT_EXPERTS}"
    backend.before_write = lambda: apps.patch_namespaced_stateful_set(name, namespace, patch)
    await backend.scale(Pool.TEXT_EXPERTS, 4)
    assert backend.writes == 2
    assert wanted(apps, namespace, Pool.TEXT_EXPERTS) == 4


@pytest.mark.parametrize("when", ["before", "between"])
async def test_what_somebody_else_scaled_is_not_overwritten(
    backend: Backend, apps: client.AppsV1Api, namespace: str, when: str
) -> None:
    await backend.replicas()

    def scale_elsewhere() -> None:
        body = {"spec": {"replicas": 7}}
        apps.patch_namespaced_stateful_set_scale(f"r-{Pool.TEXT_EXPERTS}", namespace, body)

    if when == "before":
        scale_elsewhere()
    backend.before_write = scale_elsewhere
    with pytest.raises(errors.FailedPrecondition) as refused:
        await backend.scale(Pool.TEXT_EXPERTS, 1)
    assert refused.value.reason == "SCALED_ELSEWHERE"
    assert wanted(apps, namespace, Pool.TEXT_EXPERTS) == 7
    await backend.replicas()
    await backend.scale(Pool.TEXT_EXPERTS, 1)
    assert wanted(apps, namespace, Pool.TEXT_EXPERTS) == 1


async def test_who_does_not_lead_writes_nothing(
    backend: Backend, apps: client.AppsV1Api, namespace: str
) -> None:
    await backend.replicas()

    def depose() -> None:
        backend.leads = False

    backend.before_write = depose
    with pytest.raises(errors.FailedPrecondition, match="does not lead"):
        await backend.scale(Pool.TEXT_EXPERTS, 9)
    assert wanted(apps, namespace, Pool.TEXT_EXPERTS) == 2


async def test_the_highest_ordinal_is_retired(backend: Backend) -> None:
    def member(name: str) -> MemberInfo:
        return MemberInfo(member_id=f"{name}-0123456789ab", role=Role.EXPERT_POOL, address="a:1")

    await backend.replicas()
    pods = [member(f"r-text-experts-{i}") for i in (0, 1, 10, 2)]
    assert await backend.retire(Pool.TEXT_EXPERTS, pods) is pods[1]
    await backend.scale(Pool.TEXT_EXPERTS, 3)
    assert await backend.retire(Pool.TEXT_EXPERTS, pods) is pods[3]
    assert await backend.retire(Pool.TEXT_EXPERTS, pods[:3]) is None
    assert await backend.retire(Pool.VISION_EXPERTS, pods) is None


async def test_an_api_server_that_dies_under_a_call_is_waited_for(
    control_plane: ControlPlane, backend: Backend, apps: client.AppsV1Api, namespace: str
) -> None:
    await backend.replicas()
    with control_plane.without_apiserver():
        with pytest.raises(errors.Unavailable, match="no answer from the Kubernetes API server"):
            await backend.replicas()
        with pytest.raises(errors.Unavailable):
            await backend.scale(Pool.TEXT_EXPERTS, 6)
    await backend.scale(Pool.TEXT_EXPERTS, 6)
    assert wanted(apps, namespace, Pool.TEXT_EXPERTS) == 6


class Faulty(BaseHTTPRequestHandler):
    """Answers with each of `faults` in turn, and then with a scale of 3."""

    faults: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        code = self.faults.pop(0) if self.faults else 200
        body = b'{"metadata": {"resourceVersion": "1"}, "spec": {"replicas": 3}}'
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        ([500, 429, 503], None),
        ([500] * 4, errors.Unavailable),
        ([403], errors.FailedPrecondition),
        ([401, 500], errors.FailedPrecondition),
    ],
)
async def test_only_what_may_pass_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, faults: list[int], error: type[Exception] | None
) -> None:
    monkeypatch.setattr(Faulty, "faults", list(faults))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    configuration = client.Configuration(host=f"http://127.0.0.1:{server.server_port}")
    backend = Backend(client.ApiClient(configuration), "any")
    try:
        if error is None:
            assert await backend.replicas() == dict.fromkeys(Pool, 3)
        else:
            with pytest.raises(error):
                await backend.replicas()
        assert len(Faulty.faults) == max(0, len(faults) - adapter.ATTEMPTS) + faults.count(401)
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def store(control_plane: ControlPlane, namespace: str) -> KubernetesLease:
    return KubernetesLease(control_plane.api(), namespace=namespace, name="r-orchestrator")


async def test_a_lease_is_written_over_the_version_it_names_only(store: KubernetesLease) -> None:
    assert await store.read() is None
    first = await store.write(Lease(holder="a", duration_s=LEASE_S))
    assert await store.read() == first
    with pytest.raises(errors.AlreadyExists):
        await store.write(Lease(holder="b", duration_s=LEASE_S))
    second = await store.write(replace(first, holder="b", transitions=1))
    assert await store.read() == second
    with pytest.raises(errors.AlreadyExists):
        await store.write(first)
    freed = await store.write(replace(second, holder=""))
    assert (freed.holder, freed.transitions) == ("", 1)


async def test_renewals_keep_the_time_of_the_take_over(
    control_plane: ControlPlane, store: KubernetesLease, namespace: str
) -> None:
    leases = client.CoordinationV1Api(control_plane.api())
    held = await store.write(Lease(holder="a", duration_s=LEASE_S))
    taken = leases.read_namespaced_lease("r-orchestrator", namespace).spec
    held = await store.write(held)
    renewed = leases.read_namespaced_lease("r-orchestrator", namespace).spec
    assert (renewed.acquire_time, renewed.holder_identity) == (taken.acquire_time, "a")
    assert renewed.renew_time > taken.renew_time
    await store.write(replace(held, holder="b"))
    assert leases.read_namespaced_lease("r-orchestrator", namespace).spec.acquire_time > (
        renewed.acquire_time
    )


@pytest.fixture
async def campaigns() -> AsyncIterator[dict[Candidate, asyncio.Task[None]]]:
    """Candidates and their loops."""
    running: dict[Candidate, asyncio.Task[None]] = {}
    yield running
    for task in running.values():
        task.cancel()


async def test_a_leader_cut_off_from_its_lease_stops_before_the_next_one_starts(
    store: KubernetesLease, campaigns: dict[Candidate, asyncio.Task[None]]
) -> None:
    class Broken:
        """The same lease, which fails once `is_broken`."""

        is_broken = False

        async def read(self) -> Lease | None:
            return await self._checked().read()

        async def write(self, lease: Lease) -> Lease:
            return await self._checked().write(lease)

        def _checked(self) -> KubernetesLease:
            if self.is_broken:
                raise errors.Unavailable("cut off")
            return store

    broken = Broken()
    first = Candidate(broken, identity="a", duration_s=LEASE_S)
    second = Candidate(store, identity="b", duration_s=LEASE_S)
    campaigns[first] = asyncio.create_task(first.run())
    await asyncio.wait_for(first.elected.wait(), WAIT_S)
    campaigns[second] = asyncio.create_task(second.run())
    async with asyncio.timeout(WAIT_S):
        while second.leader != "a":  # noqa: ASYNC110  # by what it reads
            await asyncio.sleep(0.01)
    broken.is_broken = True
    async with asyncio.timeout(WAIT_S):
        while not second.leads():
            assert not (first.leads() and second.leads())
            await asyncio.sleep(0.01)
        await campaigns[first]
    assert not first.leads()
    assert second.leader == "b"


def test_the_namespace_goes_away_with_what_is_in_it(
    control_plane: ControlPlane, namespace: str
) -> None:
    """The controllers run: the other tests may rely on them."""
    apps = client.AppsV1Api(control_plane.api())
    apps.create_namespaced_stateful_set(namespace, stateful_set("r-decoder", 1))
    core = client.CoreV1Api(control_plane.api())
    wait_until(lambda: core.list_namespaced_pod(namespace).items, "a pod is made")
