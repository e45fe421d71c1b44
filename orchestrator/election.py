"""One leader among several orchestrators, by a lease: the rules, and the loop that follows them.

The rules are those of Kubernetes' own components. Nobody compares clocks: a candidate measures how
long the lease has stood unchanged before its own eyes, and takes it over once that is the duration
written in it. The holder counts from before it sent its last renewal, and stops to act after
ACT_SHARE of the duration, so it is idle before anyone else can start.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from chiasm import errors
from chiasm.telemetry import metrics

ACT_SHARE = 2 / 3
"""The part of a lease in which its holder acts; the rest is for what it began before."""

TRIES_PER_LEASE = 6
"""How often in a lease it is renewed, or looked at."""

NEVER = float("-inf")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who leads, as it is stored.

    `holder` is empty when nobody does. `version` names the stored state; empty: there is none yet.
    """

    duration_s: float
    holder: str = ""
    transitions: int = 0
    version: str = ""


class LeaseStore(Protocol):
    """Where one lease is kept; the calls are bounded in time."""

    async def read(self) -> Lease | None:
        """The lease, or None where there is none yet. Raises Unavailable."""

    async def write(self, lease: Lease) -> Lease:
        """Stores a lease over the version it names, and returns it with its new version.

        Raises AlreadyExists when another version is stored, Unavailable when it is not known
        whether it was written.
        """


class Election:
    """The rules for one candidate; pure, with the time passed in.

    `identity` must be unique for one life of the process, so that a lease it holds is its own.
    """

    def __init__(self, *, identity: str, duration_s: float) -> None:
        self.identity = identity
        self.lease = Lease(duration_s=duration_s)
        self._duration_s = duration_s
        self._seen_at = NEVER
        self._acts_until = NEVER

    def observe(self, lease: Lease | None, *, now: float) -> None:
        """Takes note of what is stored.

        A lease that somebody has deleted counts as seen a last time now: its holder may still act.
        A candidate that begins just then knows of no holder, and claims; nobody should delete it.
        """
        if lease is None:
            lease = replace(self.lease, version="")
        if lease.version != self.lease.version:
            self.lease, self._seen_at = lease, now
        if lease.holder != self.identity:
            self._acts_until = NEVER

    def claim(self, *, now: float) -> Lease | None:
        """What to write now: a renewal, or a take-over of a lease that is free or has run out."""
        held = self.lease
        if held.holder == self.identity:
            return replace(held, duration_s=self._duration_s)
        if held.holder and now < self._seen_at + held.duration_s:
            return None
        return Lease(
            duration_s=self._duration_s,
            holder=self.identity,
            transitions=held.transitions + bool(held.version),
            version=held.version,
        )

    def written(self, lease: Lease, *, sent_at: float) -> None:
        """Takes note that a claim was stored; `sent_at` lies before it was sent."""
        self.lease, self._seen_at = lease, sent_at
        self._acts_until = sent_at + ACT_SHARE * lease.duration_s

    def leads(self, *, now: float) -> bool:
        """Whether this candidate may act."""
        return now < self._acts_until


class Candidate:
    """Campaigns for the lease, and keeps it.

    A term of office is one life of a process: who has lost the lease does not try again, but ends
    and leaves it to its supervisor to start a new candidate.
    """

    def __init__(
        self,
        store: LeaseStore,
        *,
        identity: str,
        duration_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.elected = asyncio.Event()
        self._store = store
        self._clock = clock
        self._duration_s = duration_s
        self._election = Election(identity=identity, duration_s=duration_s)
        self._busy = asyncio.Lock()
        self._has_resigned = False
        self._told = ""

    @property
    def leader(self) -> str:
        """The identity that holds the lease as far as known; empty when none does."""
        return self._election.lease.holder

    def leads(self) -> bool:
        """Whether this process may act at this moment; ask before every single act."""
        return self._election.leads(now=self._clock())

    async def run(self) -> None:
        """Campaigns until elected, then renews; returns when the lease is lost or given back."""
        while True:
            async with self._busy:
                # Asked before the next try: a lease that had run out meanwhile must not be taken
                # again as if nothing had happened.
                if self._is_over():
                    metrics.ORCHESTRATOR_LEADS.set(0)
                    return
                await self._try()
            if self.leads() and not self.elected.is_set():
                log.info("elected", transitions=self._election.lease.transitions)
                self.elected.set()
            metrics.ORCHESTRATOR_LEADS.set(self.leads())
            # Candidates that start together should not go on colliding.
            await asyncio.sleep(self._duration_s / TRIES_PER_LEASE * random.uniform(0.75, 1.0))

    async def resign(self) -> None:
        """Ends the candidature, and frees the lease, so that nobody has to wait for its end.

        Best effort: where the store does not answer, the lease runs out.
        """
        async with self._busy:
            self._has_resigned = True
            if not self.leads():
                return
            try:
                freed = await self._store.write(replace(self._election.lease, holder=""))
                self._election.observe(freed, now=self._clock())
            except errors.ChiasmError as error:
                log.warning("lease_not_freed", error=str(error))

    def _is_over(self) -> bool:
        if self._has_resigned:
            return True
        if self.elected.is_set() and not self.leads():
            log.error("lease_lost", holder=self.leader)
            return True
        return False

    async def _try(self) -> None:
        """One look at the lease, and one write where the rules call for it."""
        sent_at, told = self._clock(), self._told
        self._told = ""
        try:
            self._election.observe(await self._store.read(), now=self._clock())
            claim = self._election.claim(now=self._clock())
            if claim is not None:
                self._election.written(await self._store.write(claim), sent_at=sent_at)
        except errors.AlreadyExists:
            return  # somebody was faster; the next look tells who
        except errors.ChiasmError as error:
            self._told = str(error)
            if told != self._told:
                log.warning("lease_not_reached", error=self._told)
