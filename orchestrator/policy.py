"""Desired replicas of each pool: a pure function of what was observed of late.

Fast up, slow down. Up: as soon as the smoothed demand exceeds what the replicas should carry, by as
many as it takes within `max_step`. Down: one at a time, when even the busiest moment of a long
window would have fitted on one less. Where something is not known, or not in order, the number
stays. See docs/scaling.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from chiasm.orchestrator.observer import Observation, PoolView
from chiasm.orchestrator.types import Decision, Pool, PoolConfig

IDLE = 1e-3
"""Demand below which a pool that nobody waits for may go to zero."""

KNOWN_SHARE = 0.5
"""Part of the down window for which demand must be known."""

_ROUNDING = 1e-9


def decide(history: Sequence[Observation], configs: Mapping[Pool, PoolConfig]) -> Decision:
    """The decision at the last observation. History is in order of time, and reaches back at least
    as far as `memory_s`, or to the start."""
    now = history[-1]
    verdicts = {pool: _decide(_Past.of(pool, history), configs[pool]) for pool in now.pools}
    return Decision(
        at=now.at,
        before={pool: view.replicas for pool, view in now.pools.items()},
        replicas={pool: verdict.replicas for pool, verdict in verdicts.items()},
        reasons={pool: verdict.reason for pool, verdict in verdicts.items()},
    )


def memory_s(configs: Mapping[Pool, PoolConfig]) -> float:
    """How far back a decision looks."""
    return max(
        (
            max(c.down_window_s, c.up_dwell_s, c.down_dwell_s, 5 * c.up_tau_s)
            for c in configs.values()
        ),
        default=0.0,
    )


class _Verdict(NamedTuple):
    replicas: int
    reason: str


class _Past(NamedTuple):
    """One pool's history, up to now."""

    times: Sequence[float]
    views: Sequence[PoolView]

    @classmethod
    def of(cls, pool: Pool, history: Sequence[Observation]) -> _Past:
        seen = [(o.at, o.pools[pool]) for o in history if pool in o.pools]
        return cls([at for at, _ in seen], [view for _, view in seen])

    def smoothed(self, tau_s: float) -> float:
        """Demand, exponentially smoothed."""
        value, last = None, 0.0
        for at, view in zip(self.times, self.views, strict=True):
            if view.demand is None:
                continue
            demand = view.demand.replicas
            if value is None:
                value = demand
            else:
                value += (demand - value) * (1 - math.exp(-(at - last) / tau_s))
            last = at
        return value or 0.0

    def within(self, window_s: float) -> Sequence[PoolView]:
        """The views of the window that ends now."""
        return [
            view
            for at, view in zip(self.times, self.views, strict=True)
            if at >= self.times[-1] - window_s
        ]

    def spans(self, window_s: float) -> bool:
        """Whether the pool was watched for so long."""
        return self.times[-1] - self.times[0] >= window_s

    def unchanged_s(self) -> float:
        """Time since the number of replicas was another; infinite when it never was."""
        replicas = self.views[-1].replicas
        for at, view in zip(reversed(self.times), reversed(self.views), strict=True):
            if view.replicas != replicas:
                return self.times[-1] - at
        return math.inf


def _decide(past: _Past, config: PoolConfig) -> _Verdict:
    now = past.views[-1]
    have, low, high = now.replicas, config.min_replicas, config.max_replicas
    if have < low:
        return _Verdict(low, f"the minimum is {low}")
    if have == 0:
        if now.is_wanted:
            wanted = max(now.floor, min(_needed(past, config), config.max_step))
            return _Verdict(min(wanted, high), "somebody waits for it")
        return _Verdict(0, "nobody waits for it")
    if have < min(now.floor, high):
        return _Verdict(min(now.floor, high), f"{now.floor} servers are needed to hold every shard")
    if now.demand is None:
        return _Verdict(have, f"held: {now.gap}")
    return _grow(past, config) or _shrink(past, config)


def _grow(past: _Past, config: PoolConfig) -> _Verdict | None:
    """More replicas; None when these will do."""
    now = past.views[-1]
    have, strain = now.replicas, now.demand.strain if now.demand else 0.0
    demand, wanted = past.smoothed(config.up_tau_s), _needed(past, config)
    reason = f"demand {demand:.2f} of {have} is above {config.up:.0%}"
    # Replicas that are on their way will ease the strain; until then more would be too many.
    if wanted <= have and strain > 1 and not (now.obstacle or now.absent):
        wanted, reason = have + 1, f"{strain:.1f} times the target of {config.target_s:g} s"
    wanted = min(wanted, max(have + config.max_step, 2 * have), config.max_replicas)
    if wanted <= have:
        return None
    if (unchanged_s := past.unchanged_s()) < config.up_dwell_s:
        return _Verdict(have, f"held: {reason}, but it changed {unchanged_s:.0f} s ago")
    return _Verdict(wanted, reason)


def _needed(past: _Past, config: PoolConfig) -> int:
    """Replicas that carry the demand within their share."""
    return math.ceil(past.smoothed(config.up_tau_s) / config.up - _ROUNDING)


def _shrink(past: _Past, config: PoolConfig) -> _Verdict:
    """One replica less, all of an idle pool that may go to zero, or what there is."""
    have = past.views[-1].replicas
    left, reason = _surplus(past, config)
    if left < have and (objection := _objection(past, config, left)):
        return _Verdict(have, f"held: {reason}, but {objection}")
    return _Verdict(left, reason)


def _surplus(past: _Past, config: PoolConfig) -> _Verdict:
    """How many would do in the next step down."""
    now, window = past.views[-1], past.within(config.down_window_s)
    have = now.replicas
    if have > config.max_replicas:
        return _Verdict(have - 1, f"the maximum is {config.max_replicas}")
    known = [(view.replicas, view.demand) for view in window if view.demand is not None]
    peak = max((demand.replicas for _, demand in known), default=0.0)
    # What strains these would strain one less the more, and grow again.
    is_strained = any(demand.strain * count > max(1, have - 1) for count, demand in known)
    if config.min_replicas == 0 and peak < IDLE and not any(view.is_wanted for view in window):
        return _Verdict(0, f"idle for {config.down_window_s:g} s")
    is_least = have <= max(config.min_replicas, now.floor)
    # What is left must carry the same load.
    is_used = peak >= config.down * have or peak > config.up * (have - 1) or is_strained
    if is_least or is_used:
        return _Verdict(have, f"demand {peak:.2f} of {have}")
    return _Verdict(have - 1, f"demand {peak:.2f} of {have} is below {config.down:.0%}")


def _objection(past: _Past, config: PoolConfig, left: int) -> str:
    """Why a pool keeps what it does not need; empty when nothing speaks against `left`."""
    now, window = past.views[-1], past.within(config.down_window_s)
    if not past.spans(config.down_window_s):
        return f"it was watched for less than {config.down_window_s:g} s"
    if sum(view.demand is not None for view in window) < KNOWN_SHARE * len(window):
        return "too little is known of the last while"
    # What goes as a whole may be in any state.
    if left and (obstacle := now.obstacle or _absence(now, window)):
        return obstacle
    if (unchanged_s := past.unchanged_s()) < config.down_dwell_s:
        return f"it changed {unchanged_s:.0f} s ago"
    return ""


def _absence(now: PoolView, window: Sequence[PoolView]) -> str:
    """Whose coming is waited for. Of a pool that does its work, those that were away for the whole
    window cannot start, or are not needed."""
    if now.absent < now.replicas and all(view.absent for view in window):
        return ""
    return f"{now.absent} of {now.replicas} replicas are not ready" if now.absent else ""
