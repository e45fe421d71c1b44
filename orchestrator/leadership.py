"""Whether this process leads: always when it is alone, otherwise while it holds the lease."""

from __future__ import annotations

import asyncio

from pydantic import Field

from chiasm import errors
from chiasm.config import ProcessSettings
from chiasm.orchestrator.election import TRIES_PER_LEASE, Candidate
from chiasm.telemetry import metrics


class LeadershipSettings(ProcessSettings):
    """What several orchestrators of one system have in common."""

    namespace: str = Field("default", description="Kubernetes namespace of lease and workloads.")
    election_lease: str = Field(
        "",
        description="Name of the Lease by which several orchestrators choose their leader; empty: "
        "this one is alone.",
    )
    election_s: int = Field(
        15, ge=1, le=600, description="Duration of that lease: a leader silent so long is replaced."
    )


class Leadership:
    """One process's part in it. `campaign` runs for as long as the process takes part."""

    def __init__(self, settings: LeadershipSettings, *, instance_id: str) -> None:
        self._settings, self._instance_id = settings, instance_id
        self._is_alone = not settings.election_lease
        self._candidate: Candidate | None = None
        self._started = asyncio.Event()

    def leads(self) -> bool:
        """Whether this process may act at this moment; ask before every single act."""
        return self._is_alone or (self._candidate is not None and self._candidate.leads())

    def leader(self) -> str:
        """host:port of the leader, as far as known; empty when there is none."""
        return "" if self._candidate is None else self._candidate.leader.rpartition("@")[2]

    async def campaign(self, address: str) -> None:
        """Stands for election under the address of its server; returns when the lease is lost.

        Raises FailedPrecondition without access to Kubernetes. Alone: leads, and never returns.
        """
        if not self._is_alone:
            self._candidate = self._candidate_at(address)
        self._started.set()
        if self._candidate is None:
            metrics.ORCHESTRATOR_LEADS.set(1)
            await asyncio.Event().wait()
        else:
            await self._candidate.run()

    async def elected(self) -> None:
        """Returns when this process has become the leader."""
        await self._started.wait()
        if self._candidate is not None:
            await self._candidate.elected.wait()

    async def resign(self) -> None:
        """Hands over to the next one, if it leads."""
        if self._candidate is not None:
            await self._candidate.resign()

    def _candidate_at(self, address: str) -> Candidate:
        settings = self._settings
        try:
            from chiasm.orchestrator.kubernetes import KubernetesLease, connect
        except ImportError:
            raise errors.FailedPrecondition(
                "--election-lease needs the Kubernetes client: pip install chiasm[kubernetes]"
            ) from None
        store = KubernetesLease(
            connect(),
            namespace=settings.namespace,
            name=settings.election_lease,
            timeout_s=settings.election_s / TRIES_PER_LEASE,
        )
        identity = f"{self._instance_id[:12]}@{address}"
        return Candidate(store, identity=identity, duration_s=settings.election_s)
