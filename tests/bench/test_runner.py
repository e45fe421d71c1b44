"""The two loops, against a fake backend in virtual time."""

from __future__ import annotations

import asyncio
from itertools import islice

import numpy as np
import pytest
from bench.fakes import FIRST_S, GAP_S, FakeBackend
from bench.virtual import run

from chiasm.bench import arrivals, records
from chiasm.bench.lengths import Uniform
from chiasm.bench.records import Collector
from chiasm.bench.runner import Plan, Runner
from chiasm.bench.stats import Summary, summarize
from chiasm.bench.workload import RandomWorkload, limited

OUTPUT_TOKENS = 5
E2E_S = FIRST_S + (OUTPUT_TOKENS - 1) * GAP_S


def _plan(num: int, *, turns: int = 1, **options: object) -> Plan:
    mix = RandomWorkload(
        input_len=Uniform(8, 8), output_len=Uniform(OUTPUT_TOKENS, OUTPUT_TOKENS), turns=turns
    )
    conversations = limited(mix.conversations(shape=(0,), content=(0,)), num)
    return Plan(conversations=conversations, **options)  # type: ignore[arg-type]  # of a test


def _run(backend: FakeBackend, plan: Plan) -> tuple[Collector, Summary]:
    collector = Collector()

    async def main() -> None:
        await Runner(backend, plan, collector).run()

    run(main())
    return collector, summarize(collector, None)


def test_open_loop_keeps_its_times_and_measures_each_token() -> None:
    collector, summary = _run(FakeBackend(), _plan(50, arrivals=arrivals.constant(100.0)))
    assert summary.succeeded == 50
    intended = sorted(r.intended_s for r in collector.records)
    assert intended == pytest.approx([i / 100 for i in range(50)])
    for record in collector.records:
        assert record.lag_s == pytest.approx(0, abs=1e-9)
        assert record.ttft_s == pytest.approx(FIRST_S)
        assert record.gaps_s == pytest.approx([GAP_S] * (OUTPUT_TOKENS - 1))
        assert record.e2e_s == pytest.approx(E2E_S)
        assert record.tpot_s == pytest.approx(GAP_S)
    assert summary.duration_s == pytest.approx(49 / 100 + E2E_S)
    assert summary.output_tokens_per_s == pytest.approx(50 * OUTPUT_TOKENS / summary.duration_s)
    assert not summary.is_generator_late


def test_open_loop_does_not_wait_for_answers() -> None:
    backend = FakeBackend()
    _run(backend, _plan(40, arrivals=arrivals.constant(1000.0)))
    assert backend.most_in_flight == 40


def test_a_stall_shows_in_the_tail_of_the_open_loop_and_not_of_the_closed_one() -> None:
    """2 s of 10 s stand still: a fifth of the arrivals waits, one second on average."""
    opened, _ = _run(FakeBackend(stall=(4.0, 6.0)), _plan(1000, arrivals=arrivals.constant(100.0)))
    waits = np.array([r.ttft_s for r in opened.records]) - FIRST_S
    assert (waits > 0.001).mean() == pytest.approx(0.2, abs=0.01)
    assert np.percentile(waits, 90) == pytest.approx(1.0, abs=0.02)
    assert waits.max() == pytest.approx(2.0, abs=0.02)
    # One at a time, as many as it managed: a single request noticed.
    closed, _ = _run(FakeBackend(stall=(4.0, 6.0)), _plan(50, concurrency=1))
    naive = np.array([r.ttft_s for r in closed.records]) - FIRST_S
    assert (naive > 0.001).sum() == 1
    assert np.percentile(naive, 90) == pytest.approx(0, abs=1e-6)


def test_a_late_generator_is_charged_and_flagged() -> None:
    """The loop is held up for 0.5 s: what was due meanwhile is late by the rest of it."""
    backend = FakeBackend()
    plan = _plan(100, arrivals=arrivals.constant(100.0))
    collector = Collector()

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def hold() -> None:
            loop._jumping.now += 0.5  # type: ignore[attr-defined]  # of the virtual loop

        loop.call_later(0.2, hold)
        await Runner(backend, plan, collector).run()

    run(main())
    late = [r for r in collector.records if r.lag_s > 0.001]
    assert len(late) == pytest.approx(50, abs=2)
    assert max(r.lag_s for r in late) == pytest.approx(0.5, abs=0.02)
    for record in late:
        assert record.ttft_s == pytest.approx(FIRST_S + record.lag_s, abs=1e-6)
    assert summarize(collector, None).is_generator_late


@pytest.mark.parametrize("concurrency", [1, 4])
def test_closed_loop_holds_its_concurrency(concurrency: int) -> None:
    backend = FakeBackend()
    collector, summary = _run(backend, _plan(24, concurrency=concurrency))
    assert backend.most_in_flight == concurrency
    assert summary.succeeded == len(collector.records) == 24
    assert summary.duration_s == pytest.approx(24 / concurrency * E2E_S)


def test_duration_ends_the_sending_and_lets_the_rest_finish() -> None:
    opened, _ = _run(FakeBackend(), _plan(999, arrivals=arrivals.constant(10.0), duration_s=2.05))
    assert len(opened.records) == 21
    closed, _ = _run(FakeBackend(), _plan(999, concurrency=2, duration_s=10 * E2E_S - 0.01))
    assert len(closed.records) == 20
    assert not [r for r in opened.records + closed.records if r.error]


def test_failures_stay_in_the_denominator() -> None:
    backend = FakeBackend(fails=lambda i: "RESOURCE_EXHAUSTED" if i % 4 == 0 else "")
    _, summary = _run(backend, _plan(40, arrivals=arrivals.constant(50.0)))
    assert (summary.requests, summary.succeeded) == (40, 30)
    assert summary.failed == {"RESOURCE_EXHAUSTED": 10}
    assert summary.latency_ms["e2e"].count == 30


def test_timeouts() -> None:
    backend = FakeBackend(stall=(0.45, 60.0))
    collector, summary = _run(backend, _plan(20, arrivals=arrivals.constant(10.0), timeout_s=1.0))
    assert summary.failed == {records.TIMEOUT: 15}
    assert backend.in_flight == 0
    assert max(r.e2e_s for r in collector.records) == pytest.approx(1.0)


def test_bound_of_requests_in_flight() -> None:
    backend = FakeBackend()
    _, summary = _run(backend, _plan(100, arrivals=arrivals.constant(1e6), max_in_flight=30))
    assert backend.most_in_flight == 30
    assert summary.failed == {records.IN_FLIGHT_LIMIT: 70}
    assert summary.requests == 100


def test_turns_follow_the_answers() -> None:
    backend = FakeBackend()
    collector, summary = _run(
        backend, _plan(9, turns=3, arrivals=arrivals.constant(1.0), think_time_s=2.0)
    )
    assert summary.succeeded == 9
    assert sorted(len(h) for h in backend.histories) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    answer = tuple(range(OUTPUT_TOKENS))
    assert all(e.token_ids == answer for h in backend.histories for e in h)
    first = [r for r in collector.records if r.conversation == 0]
    expected = [i * (E2E_S + 2.0) for i in range(3)]
    assert [r.intended_s for r in first] == pytest.approx(expected)


def test_turns_after_a_failed_one_count_as_failed() -> None:
    backend = FakeBackend(fails=lambda i: "INTERNAL" if i == 1 else "")
    _, summary = _run(backend, _plan(8, turns=4, concurrency=1))
    assert summary.failed == {records.PREVIOUS_TURN_FAILED: 2, "INTERNAL": 1}
    assert (summary.requests, summary.succeeded) == (8, 5)


def test_cancellation_records_what_was_in_flight() -> None:
    collector, backend = Collector(), FakeBackend()

    async def main() -> None:
        plan = _plan(100, arrivals=arrivals.constant(100.0))
        task = asyncio.create_task(Runner(backend, plan, collector).run())
        await asyncio.sleep(0.505)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    summary = summarize(collector, None)
    assert summary.requests == 51
    assert summary.failed == {records.INTERRUPTED: 18}
    assert backend.in_flight == 0


def test_the_store_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_REQUESTS", 20)
    _, summary = _run(FakeBackend(), _plan(1000, concurrency=2))
    assert summary.is_cut
    assert summary.requests == pytest.approx(20, abs=1)


def test_same_seed_same_run() -> None:
    def once() -> list[tuple[float, float]]:
        times = islice(arrivals.gamma(20.0, 1.0, (7,)), 100)
        collector, _ = _run(FakeBackend(stall=(1, 2)), _plan(100, arrivals=times))
        return [(r.intended_s, r.e2e_s) for r in collector.records]

    assert once() == once()
