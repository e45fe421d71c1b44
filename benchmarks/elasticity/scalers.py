"""Who decides: chiasm's policy, what Kubernetes brings, and one who knows the future.

hpa: the HorizontalPodAutoscaler by CPU at 70 % with its defaults: every 15 s, 10 % tolerance, up by
    doubling or four pods, down by the highest wish of 300 s. It cannot go to zero.
keda: the same machine on the length of queues, a target of work per replica, and to zero after a
    cooldown of 300 s.
oracle: has seen the same day with everything at its highest, and has ready in time what was used
    of it. It pays no attention to what its many changes would cost.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.elasticity.rates import Rates
from benchmarks.elasticity.signals import Reports
from benchmarks.elasticity.system import System
from chiasm.orchestrator.planner import Planner
from chiasm.orchestrator.types import Pool, PoolConfig

CPU_TARGET = 0.7
QUEUE_TARGETS = {
    Pool.ENCODER: 2.0,
    Pool.VISION_EXPERTS: 2.0,
    Pool.TEXT_EXPERTS: 8.0,
    Pool.DECODER: 5.0,
}
"""Items per replica: images, images, requests that decode, requests that wait."""

HPA_PERIOD_S, HPA_TOLERANCE, HPA_STABILISATION_S = 15.0, 0.1, 300.0
KEDA_COOLDOWN_S = 300.0
AHEAD_S = 6.0
"""How much longer than a start the oracle looks ahead."""

CAN_SLEEP = (Pool.ENCODER, Pool.VISION_EXPERTS)


class Scaler(Protocol):
    """Says how many replicas each pool should have; asked every two seconds."""

    def decide(self, system: System) -> Mapping[Pool, int]:
        """Replicas now wanted."""
        ...


class Chiasm:
    """The policy of the orchestrator, with reports as members would send them."""

    def __init__(self, configs: Mapping[Pool, PoolConfig]) -> None:
        self._planner, self._reports = Planner(configs), Reports()

    def decide(self, system: System) -> Mapping[Pool, int]:
        return self._planner.step(self._reports.signals(system)).replicas


@dataclass(slots=True)
class _Recent:
    """What one pool's autoscaler remembers."""

    wishes: deque[tuple[float, int]] = field(default_factory=deque)
    idle_since: float | None = None
    busy_s: float = 0.0


class Hpa:
    """metric: usage of a pool over its target, per replica there is; 1 is just right."""

    def __init__(
        self,
        metric: Callable[[System, Pool, float], float],
        *,
        highest: int,
        can_sleep: Sequence[Pool] = (),
    ) -> None:
        self._metric, self._highest, self._can_sleep = metric, highest, can_sleep
        self._recent = {pool: _Recent() for pool in Pool}
        self._last = -math.inf

    def decide(self, system: System) -> Mapping[Pool, int]:
        counts = {pool: fleet.wanted for pool, fleet in system.fleets.items()}
        if system.now - self._last < HPA_PERIOD_S:
            return counts
        elapsed_s, self._last = system.now - self._last, system.now
        return {
            pool: self._decide(system, pool, count, elapsed_s) for pool, count in counts.items()
        }

    def _decide(self, system: System, pool: Pool, count: int, elapsed_s: float) -> int:
        recent, now = self._recent[pool], system.now
        if pool in self._can_sleep:
            if _is_wanted(system, pool):
                recent.idle_since = None
            elif recent.idle_since is None:
                recent.idle_since = now
            if recent.idle_since is not None and now - recent.idle_since >= KEDA_COOLDOWN_S:
                return 0
            if not count:
                return int(recent.idle_since is None)
        usage = self._metric(system, pool, elapsed_s)
        wish = count if abs(usage - 1) <= HPA_TOLERANCE else math.ceil(count * usage)
        recent.wishes.append((now, min(max(wish, 1), self._highest)))
        while recent.wishes[0][0] < now - HPA_STABILISATION_S:
            recent.wishes.popleft()
        wish = recent.wishes[-1][1]
        if wish > count:
            return min(wish, max(2 * count, count + 4))
        return min(count, max(wished for _, wished in recent.wishes))


def by_cpu(busy_before: dict[str, float]) -> Callable[[System, Pool, float], float]:
    """CPU of the ready replicas over 70 %. A decoder that has requests never rests."""

    def metric(system: System, pool: Pool, elapsed_s: float) -> float:
        ready = system.fleets[pool].ready(system.now)
        used = 0.0
        for replica in ready:
            used += replica.busy_s - busy_before.get(replica.name, 0.0)
            busy_before[replica.name] = replica.busy_s
        return used / elapsed_s / len(ready) / CPU_TARGET if ready else 1.0

    return metric


def by_queue(system: System, pool: Pool, _: float) -> float:
    """Length of the pool's queue over its target."""
    count = max(1, system.fleets[pool].wanted)
    running = sum(r.job is not None for r in system.fleets[Pool.ENCODER].replicas)
    lengths = {
        Pool.ENCODER: len(system.images) + running,
        Pool.VISION_EXPERTS: len(system.vision),
        Pool.TEXT_EXPERTS: len(system.running),
        Pool.DECODER: len(system.waiting),
    }
    return lengths[pool] / count / QUEUE_TARGETS[pool]


def _is_wanted(system: System, pool: Pool) -> bool:
    if pool is Pool.ENCODER:
        return system.queued_patches() > 0
    return bool(system.vision) or system.queued_patches() > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Fully used replicas of each pool, every two seconds, of a system that lacks nothing."""

    times: Sequence[float]
    replicas: Mapping[Pool, Sequence[float]]


class Watched:
    """Keeps every pool at its highest, and looks what of it is used."""

    def __init__(self, highest: int, most_running: float) -> None:
        self._highest, self._most_running = highest, most_running
        self._slot_s = 0.0
        self._busy_s = dict.fromkeys(Pool, 0.0)
        self._times: list[float] = []
        self._used: dict[Pool, list[float]] = {pool: [] for pool in Pool}

    def decide(self, system: System) -> Mapping[Pool, int]:
        elapsed_s = system.now - (self._times[-1] if self._times else 0.0)
        self._times.append(system.now)
        for pool, fleet in system.fleets.items():
            busy_s = sum(replica.busy_s for replica in fleet.replicas)
            used = (busy_s - self._busy_s[pool]) / elapsed_s
            if pool is Pool.DECODER:
                used = self._decoders(system, elapsed_s)
            self._busy_s[pool] = busy_s
            self._used[pool].append(used)
        return dict.fromkeys(Pool, self._highest)

    def _decoders(self, system: System, elapsed_s: float) -> float:
        """Of decoders so full that each token takes as long as it may."""
        rates, before = system.rates, self._slot_s
        full_s = rates.step_s + rates.step_request_s * self._most_running
        self._slot_s = system.prefilled * rates.prefill_token_s + system.answered * full_s
        return (self._slot_s - before) / elapsed_s / self._most_running

    def usage(self) -> Usage:
        """What was seen."""
        return Usage(times=self._times, replicas=self._used)


class Oracle:
    """Has what will be needed most, from now until what it starts now is ready and a little on."""

    def __init__(self, usage: Usage, rates: Rates, *, up: float, highest: int) -> None:
        self._usage, self._rates, self._up, self._highest = usage, rates, up, highest

    def decide(self, system: System) -> Mapping[Pool, int]:
        found = {}
        for pool, used in self._usage.replicas.items():
            until = system.now + self._rates.boot_s[pool] + AHEAD_S
            first = bisect_left(self._usage.times, system.now)
            peak = max(used[first : bisect_right(self._usage.times, until)], default=0.0)
            least = 0 if pool in CAN_SLEEP else 1
            found[pool] = min(self._highest, max(least, math.ceil(peak / self._up - 1e-9)))
        return found
