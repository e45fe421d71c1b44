"""Spread over repeats, and ratios between endpoints: pairs of runs, one right after the other.

A run that was interrupted takes no part: of its requests only the quick ones have ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from chiasm.bench.experiment import Run
from chiasm.bench.stats import HEADLINES


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A metric at one load over the repeats; of a ratio, `endpoint` over `base`."""

    load: str
    endpoint: str
    base: str | None
    metric: str
    median: float
    low: float
    high: float
    repeats: int


def spreads(runs: Sequence[Run]) -> list[Spread]:
    """Every headline of every endpoint at every load."""
    found = []
    for load in _unique(str(r.slot.point) for r in runs):
        for endpoint in _unique(r.slot.endpoint for r in runs):
            for metric in HEADLINES:
                values = _by_repeat(runs, load, endpoint, metric)
                found += _spread(load, endpoint, None, metric, list(values.values()))
    return found


def ratios(runs: Sequence[Run]) -> list[Spread]:
    """Every endpoint over the first one, repeat by repeat."""
    endpoints = _unique(r.slot.endpoint for r in runs)
    found = []
    for load in _unique(str(r.slot.point) for r in runs):
        for endpoint in endpoints[1:]:
            for metric in HEADLINES:
                base = _by_repeat(runs, load, endpoints[0], metric)
                other = _by_repeat(runs, load, endpoint, metric)
                pairs = [other[i] / base[i] for i in other if base.get(i)]
                found += _spread(load, endpoint, endpoints[0], metric, pairs)
    return found


def _by_repeat(runs: Iterable[Run], load: str, endpoint: str, metric: str) -> dict[int, float]:
    get = HEADLINES[metric]
    return {
        run.slot.repeat: value
        for run in runs
        if run.is_whole
        and str(run.slot.point) == load
        and run.slot.endpoint == endpoint
        and (value := get(run.summary)) is not None
    }


def _spread(
    load: str, endpoint: str, base: str | None, metric: str, values: Sequence[float]
) -> list[Spread]:
    if not values:
        return []
    return [
        Spread(
            load=load,
            endpoint=endpoint,
            base=base,
            metric=metric,
            median=median(values),
            low=min(values),
            high=max(values),
            repeats=len(values),
        )
    ]


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
