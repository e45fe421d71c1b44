"""From the records of a run to its numbers. Percentiles are exact: all samples, none binned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from chiasm.bench.records import Collector, Record

PERCENTILES = (50, 90, 95, 99)

LAG_LIMIT_S = 0.010
"""A generator whose 99th percentile of lag is above this has measured itself too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Of `count` samples, in milliseconds. Percentiles are interpolated linearly."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Distribution | None:
        """None without samples."""
        samples = np.fromiter(seconds, np.float64) * 1e3
        if not samples.size:
            return None
        p50, p90, p95, p99 = np.percentile(samples, PERCENTILES).tolist()
        return cls(
            count=samples.size,
            mean=float(samples.mean()),
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            max=float(samples.max()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Limits in milliseconds, None where there is none. `itl` holds for every gap of a request."""

    ttft: float | None = None
    itl: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Reads `ttft=500,itl=50`. Raises ValueError."""
        limits: dict[str, float] = {}
        for item in text.split(","):
            name, _, value = item.partition("=")
            try:
                limits[name] = float(value)
            except ValueError:
                raise ValueError(f"{item!r} is not of the form ttft=500 (milliseconds)") from None
            if name not in cls.__slots__ or not limits[name] > 0:
                raise ValueError(f"{item!r}: limits are {', '.join(cls.__slots__)}, above 0")
        return cls(**limits)

    def is_met(self, record: Record) -> bool:
        """Whether a request ended well, with an answer, and within every limit."""
        if record.error or record.ttft_s is None:
            return False
        measured = (
            (self.ttft, record.ttft_s),
            (self.itl, max(record.gaps_s, default=None)),
            (self.tpot, record.tpot_s),
            (self.e2e, record.e2e_s),
        )
        return all(
            limit is None or value is None or value * 1e3 <= limit for limit, value in measured
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The numbers of one run.

    duration_s: from the first intended send to the last end; rates are per second of it.
    latency_ms: ttft, itl, tpot and e2e of the requests that ended well, as the client saw them.
    server_ms: the parts of those requests' time as the server accounts for it.
    lag_ms: how late requests were sent; loop_lag_ms: how late the generator noticed anything.
    goodput_share: requests within the SLO, of all requests; None without an SLO.
    """

    requests: int
    succeeded: int
    failed: Mapping[str, int]
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    input_tokens: int
    output_tokens: int
    num_short: int
    latency_ms: Mapping[str, Distribution]
    server_ms: Mapping[str, Distribution]
    lag_ms: Distribution | None
    loop_lag_ms: Distribution | None
    goodput_share: float | None
    goodput_per_s: float | None
    is_generator_late: bool
    is_cut: bool


def summarize(collector: Collector, slo: Slo | None) -> Summary:
    """The numbers of a run that has ended, or been ended."""
    all_records = collector.records
    good = [r for r in all_records if not r.error]
    first = min((r.intended_s for r in all_records), default=0.0)
    duration = max((r.intended_s + r.e2e_s for r in all_records), default=0.0) - first
    per_s = 1 / duration if duration > 0 else 0.0
    num_in, num_out = sum(r.input_tokens for r in good), sum(r.output_tokens for r in good)
    num_within = None if slo is None else sum(map(slo.is_met, all_records))
    lag = Distribution.of(r.lag_s for r in all_records)
    loop_lag = Distribution.of(collector.loop_lags_s)
    return Summary(
        requests=len(all_records),
        succeeded=len(good),
        failed=dict(Counter(r.error for r in all_records if r.error).most_common()),
        duration_s=duration,
        requests_per_s=len(good) * per_s,
        output_tokens_per_s=num_out * per_s,
        total_tokens_per_s=(num_in + num_out) * per_s,
        input_tokens=num_in,
        output_tokens=num_out,
        num_short=sum(r.output_tokens < r.requested_output_tokens for r in good),
        latency_ms=_latencies(good),
        server_ms=_server(good),
        lag_ms=lag,
        loop_lag_ms=loop_lag,
        goodput_share=None if num_within is None else num_within / max(len(all_records), 1),
        goodput_per_s=None if num_within is None else num_within * per_s,
        is_generator_late=any(d is not None and d.p99 > LAG_LIMIT_S * 1e3 for d in (lag, loop_lag)),
        is_cut=collector.is_full,
    )


def _latencies(good: Sequence[Record]) -> dict[str, Distribution]:
    samples: dict[str, Iterable[float]] = {
        "ttft": (r.ttft_s for r in good if r.ttft_s is not None),
        "itl": chain.from_iterable(r.gaps_s for r in good),
        "tpot": (t for r in good if (t := r.tpot_s) is not None),
        "e2e": (r.e2e_s for r in good),
    }
    return _distributions(samples)


def _server(good: Sequence[Record]) -> dict[str, Distribution]:
    parts = {part: None for r in good for part in r.timings_ns}

    def of(part: str) -> Iterable[float]:
        return (r.timings_ns[part] / 1e9 for r in good if part in r.timings_ns)

    return _distributions({part: of(part) for part in parts})


def _distributions(samples: Mapping[str, Iterable[float]]) -> dict[str, Distribution]:
    found = {name: Distribution.of(values) for name, values in samples.items()}
    return {name: d for name, d in found.items() if d is not None}


Metric = Callable[[Summary], float | None]


def _percentile(metric: str, name: str) -> Metric:
    def get(summary: Summary) -> float | None:
        found = summary.latency_ms.get(metric)
        return None if found is None else float(getattr(found, name))

    return get


HEADLINES: Mapping[str, Metric] = {
    "requests/s": lambda s: s.requests_per_s,
    "output tokens/s": lambda s: s.output_tokens_per_s,
    **{
        f"{metric} {name} ms": _percentile(metric, name)
        for metric in ("ttft", "itl", "e2e")
        for name in ("p50", "p99")
    },
    "goodput": lambda s: s.goodput_share,
}
"""The numbers by which runs are set side by side."""
