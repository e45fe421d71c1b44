"""One scenario under each scaler, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from benchmarks.elasticity.rates import Rates
from benchmarks.elasticity.scalers import (
    CAN_SLEEP,
    Chiasm,
    Hpa,
    Oracle,
    Scaler,
    Watched,
    by_cpu,
    by_queue,
)
from benchmarks.elasticity.system import LAYERS, MAX_RUNNING, Job, System
from benchmarks.elasticity.traces import Request, Scenario, requests
from chiasm.orchestrator.types import Pool, PoolConfig

SECONDS = 3600.0
STEP_S, DECIDE_S, AFTER_S = 0.25, 2.0, 600.0
HIGHEST = 8
FLAP_S = 300.0
"""A change that is taken back within this time is a flap."""

TTFT_S = {"text": 2.0, "image": 10.0}
SLOWDOWN = 3.0
"""A token may take so many times what it takes a request that is alone."""


@dataclass(slots=True)
class Run:
    """What happened: replicas every two seconds, and every request."""

    rates: Rates
    jobs: Sequence[Job] = ()
    times: list[float] = field(default_factory=list)
    replicas: dict[Pool, list[int]] = field(default_factory=lambda: {p: [] for p in Pool})
    replica_s: dict[Pool, float] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """SLO misses in per cent of all requests, cost, flaps."""
        kinds = {"text": [], "image": []}  # type: dict[str, list[Job]]
        for job in self.jobs:
            kinds["image" if job.request.images else "text"].append(job)
        found: dict[str, float] = {}
        for kind, jobs in kinds.items():
            if jobs:
                missed = sum(self._is_missed(job, kind) for job in jobs)
                waits = [_ttft_s(job) for job in jobs]
                found[f"{kind} misses %"] = round(100 * missed / len(jobs), 2)
                found[f"{kind} TTFT p95 s"] = round(float(np.percentile(waits, 95)), 2)
        found["replica-hours"] = round(sum(self.replica_s.values()) / 3600, 3)
        found["flaps"] = sum(self._flaps(pool) for pool in Pool)
        return found

    def _is_missed(self, job: Job, kind: str) -> bool:
        if job.first_token_at is None or job.finished_at is None:
            return True
        token_s = (job.finished_at - job.first_token_at) / job.request.answer_tokens
        alone_s = self.rates.step_s + self.rates.step_request_s
        return _ttft_s(job) > TTFT_S[kind] or token_s > SLOWDOWN * alone_s

    def _flaps(self, pool: Pool) -> int:
        counts = self.replicas[pool]
        changes = [
            (at, after - before)
            for at, (before, after) in zip(self.times[1:], pairwise(counts), strict=True)
            if before != after
        ]
        return sum(
            (a > 0) != (b > 0) and later - earlier <= FLAP_S
            for (earlier, a), (later, b) in pairwise(changes)
        )


def configs(rates: Rates) -> Mapping[Pool, PoolConfig]:
    """The orchestrator's defaults, with targets that follow from the rates."""
    common = PoolConfig(max_replicas=HIGHEST, up_tau_s=4.0, stale_s=10.0)
    step_s = rates.step_s + rates.step_request_s
    targets = {Pool.DECODER: SLOWDOWN * step_s, Pool.TEXT_EXPERTS: 0.2 * step_s / LAYERS}
    return {
        pool: replace(
            common,
            min_replicas=0 if pool in CAN_SLEEP else 1,
            target_s=targets.get(pool, common.target_s),
        )
        for pool in Pool
    }


def compare(scenario: Scenario, rates: Rates, seed: int) -> Mapping[str, Run]:
    """The same arrivals under each scaler."""
    made = requests(scenario, rates, seed)
    scalers: dict[str, Scaler] = {
        "chiasm": Chiasm(configs(rates)),
        "hpa on cpu": Hpa(by_cpu({}), highest=HIGHEST),
        "keda on queues": Hpa(by_queue, highest=HIGHEST, can_sleep=CAN_SLEEP),
    }
    watched = Watched(HIGHEST, _most_running(rates))
    simulate(made, scenario.seconds, rates, watched, begin=HIGHEST)
    scalers["oracle"] = Oracle(watched.usage(), rates, up=0.8, highest=HIGHEST)
    return {name: simulate(made, scenario.seconds, rates, s) for name, s in scalers.items()}


def simulate(
    made: Sequence[Request], seconds: float, rates: Rates, scaler: Scaler, *, begin: int = 1
) -> Run:
    """Serves all requests, and what is left for AFTER_S after the last one."""
    system = System(rates, dict.fromkeys(Pool, begin))
    run = Run(rates=rates)
    index, steps = 0, round(DECIDE_S / STEP_S)
    for number in range(round((seconds + AFTER_S) / STEP_S)):
        start = index
        while index < len(made) and made[index].at < system.now + STEP_S:
            index += 1
        system.step(made[start:index], STEP_S)
        if number % steps == 0:
            for pool, wanted in scaler.decide(system).items():
                system.fleets[pool].scale(wanted, system.now)
            run.times.append(system.now)
            for pool, fleet in system.fleets.items():
                run.replicas[pool].append(fleet.wanted)
        if system.now == seconds:
            # What comes after is for the requests alone, and costs nobody anything.
            run.replica_s = {pool: fleet.replica_s for pool, fleet in system.fleets.items()}
    run.jobs = system.jobs
    return run


def _most_running(rates: Rates) -> float:
    """Requests that a decoder serves together within their limit."""
    alone_s = rates.step_s + rates.step_request_s
    return min(MAX_RUNNING, (SLOWDOWN * alone_s - rates.step_s) / rates.step_request_s)


def _ttft_s(job: Job) -> float:
    """Of a request that got no answer, the time it waited."""
    return (job.first_token_at or SECONDS + AFTER_S) - job.request.at
