"""KEDA's part: what its operator and the HPA it keeps do with a ScaledObject, by their rules.

Between 0 and 1 the activity decides, pushed or asked for; above, the metric over its target, within
the bounds of the object. Pauses and stabilisation are left out.
"""

from __future__ import annotations

import contextlib
import threading

import grpc
from control.keda_client import KedaClient
from kube.node import Object
from kube.release import Release
from kubernetes import client

from chiasm.orchestrator.types import Pool

POLL_S = 0.5
RECONNECT_S = 0.5


class Keda:
    """Scales by every ScaledObject that there is at the start, until the end of the block."""

    def __init__(self, release: Release) -> None:
        self._release = release
        self._stopped = threading.Event()
        custom = client.CustomObjectsApi(release.control_plane.api())
        found = custom.list_namespaced_custom_object(
            "keda.sh", "v1alpha1", release.namespace, "scaledobjects"
        )
        self._threads = [
            threading.Thread(target=target, args=(scaled["spec"],), daemon=True)
            for scaled in found["items"]
            for target in (self._poll, self._listen)
        ]

    def __enter__(self) -> Keda:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _client(self, spec: Object) -> KedaClient:
        metadata = spec["triggers"][0]["metadata"]
        address = self._release.node.resolve(metadata["scalerAddress"])
        return KedaClient(address, **{k: v for k, v in metadata.items() if k != "scalerAddress"})

    def _poll(self, spec: Object) -> None:
        """The operator's polling and the HPA's, in one."""
        pool = Pool(spec["scaleTargetRef"]["name"].removeprefix("r-chiasm-"))
        with self._client(spec) as keda:
            while not self._stopped.wait(POLL_S):
                with contextlib.suppress(grpc.RpcError, client.ApiException):
                    # Who does not answer is not taken for idle.
                    wanted = keda.wanted_replicas() if keda.is_active() else 0
                    bounded = min(spec["maxReplicaCount"], max(spec["minReplicaCount"], wanted))
                    if bounded != self._release.wanted(pool):
                        self._release.scale(pool, bounded)

    def _listen(self, spec: Object) -> None:
        """Wakes the workload as soon as the scaler says so."""
        pool = Pool(spec["scaleTargetRef"]["name"].removeprefix("r-chiasm-"))
        while not self._stopped.wait(RECONNECT_S):
            with self._client(spec) as keda, contextlib.suppress(grpc.RpcError):
                threading.Thread(target=self._close_at_the_end, args=(keda,), daemon=True).start()
                for is_active in keda.activity():
                    if is_active and not self._release.wanted(pool):
                        self._release.scale(pool, 1)

    def _close_at_the_end(self, keda: KedaClient) -> None:
        self._stopped.wait()
        keda.close()
