"""Kubernetes under the orchestrator: the scale of the pools' StatefulSets, and the lease.

The only module that knows the client library. It works in one namespace and needs no more than
`get` and `patch` on `statefulsets/scale` of its pools, and `create`, `get` and `update` on its
lease. Nothing is watched: a scale is read when a decision needs it, so no cache can be old.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import kubernetes.client as k8s
import kubernetes.config
import structlog
import urllib3

from chiasm import errors
from chiasm.membership import MemberInfo
from chiasm.orchestrator.election import Lease
from chiasm.orchestrator.types import Pool

CALL_TIMEOUT_S = 3.0
"""Bound of one call of the API, the connection included."""

ATTEMPTS = 4
"""How often a call is made that the API server did not answer, or answered with 429 or 5xx."""

BACKOFF_S = 0.1
"""Pause before the second attempt, doubled before each further one; jittered."""

CONFLICTS = 5
"""How often a scale is read again because the StatefulSet has changed since."""

_NOT_FOUND, _CONFLICT, _TOO_MANY = 404, 409, 429

log = structlog.get_logger()


def connect() -> k8s.ApiClient:
    """A client with the rights of the pod's service account; outside of pods, of KUBECONFIG.

    Raises FailedPrecondition where there is neither.
    """
    configuration = k8s.Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            kubernetes.config.load_incluster_config(configuration)
        else:
            kubernetes.config.load_kube_config(client_configuration=configuration)
    except kubernetes.config.ConfigException as error:
        raise errors.FailedPrecondition(f"no access to Kubernetes: {error}") from None
    # The library would repeat calls by itself, without a pause and beyond any timeout.
    configuration.retries = urllib3.Retry(0)
    return k8s.ApiClient(configuration)


class StatefulSets:
    """Scales the StatefulSets `{prefix}-{pool}` of a namespace: a `Backend`.

    A StatefulSet removes its highest ordinal first, and no deletion cost of a pod changes that. So
    nobody chooses the replica that goes: `retire` names the member of the highest ordinal, the loop
    loads its shards elsewhere and drains it, and `scale` then lowers the number by one. Members
    start their ids with the name of their pod (`--member-name`).

    may_act: asked before every write; a leader whose lease has run out meanwhile writes no more.
        One that is stopped between the question and the write is held off by the resource version
        that every write names, once its successor has scaled the same pool.
    """

    def __init__(
        self, api: k8s.ApiClient, *, namespace: str, prefix: str, may_act: Callable[[], bool]
    ) -> None:
        self._apps = k8s.AppsV1Api(api)
        self._namespace, self._prefix = namespace, prefix
        self._may_act = may_act
        self._known: dict[Pool, int] = {}

    async def replicas(self) -> Mapping[Pool, int]:
        """Wanted replicas of each pool that has a StatefulSet. Raises Unavailable."""
        known = {}
        for pool in Pool:
            scale = await self._read(pool)
            if scale is not None:
                known[pool] = _replicas(scale)
        self._known = known
        return dict(known)

    async def scale(self, pool: Pool, replicas: int) -> None:
        """Sets the wanted replicas, if they still are what `replicas` said last.

        Raises FailedPrecondition when somebody else has changed them since, so that the decision is
        made anew, or when this process must not act any more; Unavailable when the API server does
        not answer; NotFound without a StatefulSet.
        """
        for _ in range(CONFLICTS):
            scale = await self._read(pool)
            if scale is None:
                raise errors.NotFound(f"there is no StatefulSet {self._name(pool)}")
            found = _replicas(scale)
            if found == replicas:
                self._known[pool] = found
                return
            if found != self._known.setdefault(pool, found):
                self._known[pool] = found
                raise errors.FailedPrecondition(
                    f"somebody else has scaled {self._name(pool)} to {found}",
                    reason="SCALED_ELSEWHERE",
                )
            if await self._write(pool, replicas, version=scale.metadata.resource_version):
                self._known[pool] = replicas
                log.info("scaled", pool=pool, replicas=replicas, before=found)
                return
        raise errors.Unavailable(f"{self._name(pool)} changes faster than it can be scaled")

    async def retire(self, pool: Pool, ranked: Sequence[MemberInfo]) -> MemberInfo | None:
        """The member of the highest ordinal; None when that pod is no member."""
        pod = f"{self._name(pool)}-{self._known.get(pool, 0) - 1}"
        return next((m for m in ranked if m.member_id.rpartition("-")[0] == pod), None)

    async def close(self) -> None:
        """Closes idle connections."""
        self._apps.api_client.close()

    async def _read(self, pool: Pool) -> Any:
        try:
            return await _call(
                self._apps.read_namespaced_stateful_set_scale, self._name(pool), self._namespace
            )
        except errors.NotFound:
            return None

    async def _write(self, pool: Pool, replicas: int, *, version: str) -> bool:
        """Whether the StatefulSet was still at this version, and is scaled."""
        body = {"metadata": {"resourceVersion": version}, "spec": {"replicas": replicas}}
        try:
            await _call(
                self._apps.patch_namespaced_stateful_set_scale,
                self._name(pool),
                self._namespace,
                body,
                may_go_on=self._may_act,
            )
        except errors.AlreadyExists:
            return False
        return True

    def _name(self, pool: Pool) -> str:
        return f"{self._prefix}-{pool}"


class KubernetesLease:
    """A coordination.k8s.io/v1 Lease: a `LeaseStore`.

    Every call is tried once: who renews a lease comes back anyway, and must know the time it took.
    """

    def __init__(
        self, api: k8s.ApiClient, *, namespace: str, name: str, timeout_s: float = CALL_TIMEOUT_S
    ) -> None:
        self._timeout_s = min(timeout_s, CALL_TIMEOUT_S)
        self._leases = k8s.CoordinationV1Api(api)
        self._namespace, self._name = namespace, name
        self._spec = k8s.V1LeaseSpec()

    async def read(self) -> Lease | None:
        """The lease, or None where there is none yet."""
        try:
            stored = await self._once(
                self._leases.read_namespaced_lease, self._name, self._namespace
            )
        except errors.NotFound:
            return None
        return self._seen(stored)

    async def write(self, lease: Lease) -> Lease:
        """Creates the lease, or replaces the version that it names."""
        now = datetime.now(UTC)
        is_renewal = lease.holder == self._spec.holder_identity
        body = k8s.V1Lease(
            metadata=k8s.V1ObjectMeta(name=self._name, resource_version=lease.version or None),
            spec=k8s.V1LeaseSpec(
                holder_identity=lease.holder or None,
                lease_duration_seconds=max(1, round(lease.duration_s)),
                lease_transitions=lease.transitions,
                acquire_time=self._spec.acquire_time if is_renewal else now,
                renew_time=now,
            ),
        )
        try:
            if lease.version:
                replace = self._leases.replace_namespaced_lease
                stored = await self._once(replace, self._name, self._namespace, body)
            else:
                create = self._leases.create_namespaced_lease
                stored = await self._once(create, self._namespace, body)
        except errors.NotFound as error:
            raise errors.AlreadyExists(f"deleted meanwhile: {error}") from None
        return self._seen(stored)

    async def _once(self, method: Callable[..., Any], *arguments: Any) -> Any:
        return await _call(method, *arguments, attempts=1, timeout_s=self._timeout_s)

    def _seen(self, stored: Any) -> Lease:
        self._spec = stored.spec
        return Lease(
            duration_s=float(stored.spec.lease_duration_seconds or 0),
            holder=stored.spec.holder_identity or "",
            transitions=stored.spec.lease_transitions or 0,
            version=stored.metadata.resource_version,
        )


def _replicas(scale: Any) -> int:
    # The API leaves out a zero.
    return int(scale.spec.replicas or 0)


async def _call(
    method: Callable[..., Any],
    *arguments: Any,
    attempts: int = ATTEMPTS,
    timeout_s: float = CALL_TIMEOUT_S,
    may_go_on: Callable[[], bool] = lambda: True,
) -> Any:
    """One call in a thread, repeated while the API server is away; its refusals as our errors.

    Raises NotFound for 404, AlreadyExists for 409, Unavailable after the last attempt, and
    FailedPrecondition for other refusals and when `may_go_on` does not allow the next attempt.
    """
    failure = ""
    for attempt in range(attempts):
        if attempt:
            await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
        if not may_go_on():
            raise errors.FailedPrecondition("this process does not lead any more")
        try:
            return await asyncio.to_thread(method, *arguments, _request_timeout=timeout_s)
        except k8s.ApiException as error:
            failure = f"{error.status} {error.reason}"
            if error.status == _NOT_FOUND:
                raise errors.NotFound(failure) from None
            if error.status == _CONFLICT:
                raise errors.AlreadyExists(failure) from None
            if error.status < 500 and error.status != _TOO_MANY:
                raise errors.FailedPrecondition(f"the API server refused: {failure}") from None
        except urllib3.exceptions.HTTPError as error:
            failure = str(error)
    raise errors.Unavailable(f"no answer from the Kubernetes API server: {failure}")
