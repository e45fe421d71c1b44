"""Numbers from records: exact percentiles, goodput with failures in it, spreads and ratios."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from chiasm.bench import compare, sweep
from chiasm.bench.curves import NUM_BINS, curves
from chiasm.bench.experiment import Run
from chiasm.bench.records import Collector, Record
from chiasm.bench.stats import Distribution, Slo, summarize
from chiasm.bench.sweep import Point


def _record(
    *, at: float = 0.0, ttft: float = 0.1, gaps: tuple[float, ...] = (0.01,), error: str = ""
) -> Record:
    return Record(
        conversation=0,
        turn=0,
        num_images=0,
        intended_s=at,
        ttft_s=ttft,
        e2e_s=ttft + sum(gaps),
        gaps_s=gaps,
        input_tokens=10,
        output_tokens=len(gaps) + 1,
        requested_output_tokens=len(gaps) + 1,
        error=error,
    )


def _collected(*records: Record) -> Collector:
    collector = Collector()
    for record in records:
        collector.add(record)
    return collector


@pytest.mark.parametrize("num", [1, 2, 7, 100, 12_345])
def test_percentiles_are_exact(num: int) -> None:
    samples = np.random.default_rng(num).lognormal(size=num)
    found = Distribution.of(samples)
    assert found is not None
    assert found.count == num
    ordered = np.sort(samples) * 1e3
    for percent, value in ((50, found.p50), (90, found.p90), (95, found.p95), (99, found.p99)):
        # Linear interpolation between the two order statistics around the rank.
        rank = percent / 100 * (num - 1)
        low = int(rank)
        high = min(low + 1, num - 1)
        expected = ordered[low] + (rank - low) * (ordered[high] - ordered[low])
        assert value == pytest.approx(expected)
    assert found.mean == pytest.approx(ordered.mean())
    assert found.max == pytest.approx(ordered[-1])


def test_no_samples_is_no_distribution() -> None:
    assert Distribution.of([]) is None
    summary = summarize(_collected(), None)
    assert (summary.requests, summary.requests_per_s, summary.latency_ms) == (0, 0.0, {})


def test_goodput_counts_failures_and_each_limit() -> None:
    records = (
        _record(),
        _record(ttft=0.3),
        _record(gaps=(0.01, 0.06, 0.01)),
        _record(gaps=(0.01,) * 200),
        _record(error="UNAVAILABLE"),
    )
    slo = Slo.parse("ttft=200,itl=50,e2e=1000")
    assert [slo.is_met(r) for r in records] == [True, False, False, False, False]
    summary = summarize(_collected(*records), slo)
    assert summary.goodput_share == pytest.approx(1 / 5)
    assert summary.goodput_per_s == pytest.approx(1 / summary.duration_s)
    assert summary.failed == {"UNAVAILABLE": 1}
    assert [Slo.parse("tpot=20").is_met(r) for r in records] == [True, True, False, True, False]
    assert not Slo.parse("e2e=1000").is_met(replace(_record(), ttft_s=None)), "no answer at all"


@pytest.mark.parametrize("text", ["ttft", "ttft=", "ttft=-1", "latency=4", "ttft=nan", "ttft=1,"])
def test_refused_slo(text: str) -> None:
    with pytest.raises(ValueError, match=r"limits|form"):
        Slo.parse(text)


def test_rates_count_answers_that_came_whole() -> None:
    summary = summarize(
        _collected(_record(), _record(at=1.0, gaps=(0.1,) * 9), _record(at=0.5, error="X")), None
    )
    assert summary.duration_s == pytest.approx(2.0)
    assert summary.requests_per_s == pytest.approx(1.0)
    assert summary.output_tokens_per_s == pytest.approx(12 / 2)
    assert summary.total_tokens_per_s == pytest.approx((12 + 20) / 2)
    assert summary.latency_ms["itl"].count == 10


def test_curves_keep_tokens_and_requests() -> None:
    records = [_record(at=float(i), ttft=0.5, gaps=(0.2,) * 4) for i in range(10)]
    found = curves(records)
    width = found.bin_s[1] - found.bin_s[0]
    assert (found.tokens_per_s * width).sum() == pytest.approx(50)
    assert found.in_flight.sum() * width == pytest.approx(10 * 1.3, abs=10 * width)
    assert len(found.bin_s) == NUM_BINS
    assert all(a <= b for a, b in pairwise(found.cdf_ms["ttft"]))


def test_endpoints_take_turns() -> None:
    points = sweep.parse("rate=1,2")
    order = [
        (s.repeat, s.point.value, s.endpoint) for s in sweep.slots(points, ["a", "b"], repeats=2)
    ]
    assert order == [(r, v, e) for r in (0, 1) for v in (1.0, 2.0) for e in ("a", "b")]


@pytest.mark.parametrize("text", ["1,2", "rate=", "rate=0", "concurrency=1.5", "rate=nan"])
def test_refused_sweep(text: str) -> None:
    with pytest.raises(ValueError, match="rate"):
        sweep.parse(text)


def test_ratios_pair_runs_of_one_repeat() -> None:
    """The machine doubles its speed between the repeats; the ratio does not see it."""
    runs = [
        _run(endpoint, repeat, ttft=base * (1.5 if endpoint == "b" else 1.0))
        for repeat, base in enumerate((0.4, 0.2))
        for endpoint in ("a", "b")
    ]
    runs.append(_run("b", 2, ttft=9.0, is_whole=False))
    runs.append(_run("a", 2, ttft=0.1))
    (ratio,) = (r for r in compare.ratios(runs) if r.metric == "ttft p50 ms")
    assert (ratio.endpoint, ratio.base, ratio.repeats) == ("b", "a", 2)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    (spread,) = (
        s for s in compare.spreads(runs) if s.metric == "ttft p50 ms" and s.endpoint == "a"
    )
    assert (spread.low, spread.median, spread.high) == pytest.approx((100, 200, 400))


def _run(endpoint: str, repeat: int, *, ttft: float, is_whole: bool = True) -> Run:
    collector = _collected(_record(ttft=ttft))
    return Run(
        slot=sweep.Slot(ordinal=0, repeat=repeat, point=Point("rate", 1.0), endpoint=endpoint),
        started_at=0.0,
        is_whole=is_whole,
        summary=summarize(collector, None),
        curves=curves(collector.records),
    )
