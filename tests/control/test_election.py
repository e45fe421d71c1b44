"""One leader at a time, whatever happens to clocks, processes and the store."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from control.lease_store import MemoryLease
from control.processes import Spawn, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm import errors
from chiasm.orchestrator.election import ACT_SHARE, Candidate, Election, Lease
from chiasm.orchestrator.leadership import Leadership, LeadershipSettings

DURATION_S = 10.0
SHORT_S, LONG_S = 0.3, 1.5
WAIT_S = 20.0


def election(identity: str = "a") -> Election:
    return Election(identity=identity, duration_s=DURATION_S)


def lease(holder: str, version: str, *, transitions: int = 0) -> Lease:
    return Lease(holder=holder, duration_s=DURATION_S, version=version, transitions=transitions)


def test_a_free_lease_is_claimed_at_once_and_held_for_a_part_of_its_duration() -> None:
    mine = election()
    mine.observe(None, now=0.0)
    claim = mine.claim(now=0.0)
    assert claim == Lease(holder="a", duration_s=DURATION_S)
    assert not mine.leads(now=0.0)
    mine.written(replace(claim, version="1"), sent_at=0.5)
    end = 0.5 + ACT_SHARE * DURATION_S
    assert mine.leads(now=end - 0.01)
    assert not mine.leads(now=end)


def test_another_ones_lease_is_left_alone_until_it_has_stood_still_for_its_duration() -> None:
    mine = election()
    mine.observe(lease("b", "1"), now=3.0)
    assert mine.claim(now=3.0 + DURATION_S - 0.01) is None
    mine.observe(lease("b", "2"), now=12.0)
    mine.observe(lease("b", "2"), now=20.0)
    assert mine.claim(now=12.0 + DURATION_S - 0.01) is None
    claim = mine.claim(now=12.0 + DURATION_S)
    assert claim == lease("a", "2", transitions=1)


def test_the_duration_that_counts_is_the_holders() -> None:
    mine = election()
    mine.observe(Lease(holder="b", duration_s=40.0, version="1"), now=0.0)
    assert mine.claim(now=39.9) is None
    assert mine.claim(now=40.0) is not None


def test_a_renewal_keeps_the_count_of_transitions() -> None:
    mine = election()
    mine.written(lease("a", "7", transitions=3), sent_at=0.0)
    assert mine.claim(now=1.0) == lease("a", "7", transitions=3)


def test_who_sees_another_holder_stops_at_once() -> None:
    mine = election()
    mine.written(lease("a", "1"), sent_at=0.0)
    assert mine.leads(now=1.0)
    mine.observe(lease("b", "2"), now=1.0)
    assert not mine.leads(now=1.0)


def test_a_freed_lease_is_claimed_at_once() -> None:
    mine = election()
    mine.observe(lease("b", "1"), now=0.0)
    mine.observe(lease("", "2"), now=0.1)
    assert mine.claim(now=0.1) == lease("a", "2", transitions=1)


def test_a_deleted_lease_is_still_its_holders_for_its_duration() -> None:
    holder, other = election("a"), election("b")
    holder.written(lease("a", "1"), sent_at=0.0)
    other.observe(lease("a", "1"), now=0.0)
    for each in (holder, other):
        each.observe(None, now=1.0)
    assert holder.leads(now=1.0)
    assert holder.claim(now=1.0) == lease("a", "")
    assert other.claim(now=1.0 + DURATION_S - 0.01) is None
    assert other.claim(now=1.0 + DURATION_S) is not None


steps = st.lists(
    st.tuples(
        st.integers(0, 2),  # who
        st.floats(0.0, 6.0),  # how long everybody waited before
        st.floats(0.0, 6.0),  # how long it stood still between looking and writing
        st.sampled_from(["lives", "store is down", "answer is lost", "lease is deleted"]),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(steps, st.tuples(*[st.floats(-1e6, 1e6)] * 3), st.tuples(*[st.floats(0.9, 1.1)] * 3))
def test_never_two_leaders(
    steps: list[tuple[int, float, float, str]],
    offsets: tuple[float, ...],
    rates: tuple[float, ...],
) -> None:
    """Three candidates, clocks apart and 10 % fast or slow, stopped at the worst times."""
    store = MemoryLease()
    candidates = [election(name) for name in "abc"]
    real = 0.0

    def clock(i: int) -> float:
        return offsets[i] + rates[i] * real

    for who, waited, stood_still, event in steps:
        real += waited
        mine, sent_at = candidates[who], clock(who)
        if event == "store is down":
            continue
        if event == "lease is deleted":
            for index, candidate in enumerate(candidates):  # nobody begins at this very moment
                candidate.observe(store.stored, now=clock(index))
            store.stored = None
        mine.observe(store.stored, now=clock(who))
        claim = mine.claim(now=clock(who))
        real += stood_still
        if claim is not None:
            try:
                written = asyncio.run(store.write(claim))
            except errors.AlreadyExists:
                continue
            if event != "answer is lost":
                mine.written(written, sent_at=sent_at)
        assert sum(c.leads(now=clock(i)) for i, c in enumerate(candidates)) <= 1


Start = Callable[..., Candidate]


@pytest.fixture
def store() -> MemoryLease:
    return MemoryLease()


@pytest.fixture
async def start(store: MemoryLease) -> AsyncIterator[Start]:
    """Starts candidates for one lease of SHORT_S; `tasks` of the function holds their loops."""
    tasks: list[asyncio.Task[None]] = []

    def begin(
        identity: str, duration_s: float = SHORT_S, clock: Callable[[], float] = time.monotonic
    ) -> Candidate:
        candidate = Candidate(store, identity=identity, duration_s=duration_s, clock=clock)
        tasks.append(asyncio.create_task(candidate.run()))
        return candidate

    begin.tasks = tasks  # type: ignore[attr-defined] # beside the function, for the tests
    yield begin
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def elected(candidate: Candidate) -> None:
    await asyncio.wait_for(candidate.elected.wait(), WAIT_S)


async def test_the_second_candidate_waits_and_knows_the_leader(start: Start) -> None:
    now, tick_s = 0.0, LONG_S / 15
    first = start("a", LONG_S, lambda: now)
    await elected(first)
    second = start("b", LONG_S, lambda: now)
    for _ in range(20):
        await asyncio.sleep(tick_s)
        now += tick_s  # and no more, however long the machine stalls
        assert not second.leads()
    assert first.leads()
    assert second.leader == "a"


async def test_resigning_hands_over_and_ends_the_term(start: Start) -> None:
    first = start("a")
    await elected(first)
    second = start("b")
    await first.resign()
    assert not first.leads()
    await elected(second)
    (task, *_) = start.tasks  # type: ignore[attr-defined] # see the fixture
    await asyncio.wait_for(task, WAIT_S)


async def test_who_has_resigned_does_not_come_back(store: MemoryLease, start: Start) -> None:
    first = start("a")
    await elected(first)
    await first.resign()
    (task,) = start.tasks  # type: ignore[attr-defined] # see the fixture
    await asyncio.wait_for(task, WAIT_S)
    assert store.stored is not None
    assert store.stored.holder == ""
    assert not first.leads()


async def test_a_term_that_has_lapsed_is_over_even_if_the_lease_is_free(
    store: MemoryLease,
) -> None:
    """Somebody else may have led meanwhile."""
    now = 0.0
    candidate = Candidate(store, identity="a", duration_s=SHORT_S, clock=lambda: now)
    task = asyncio.create_task(candidate.run())
    await elected(candidate)
    now = 10 * SHORT_S
    store.stored = Lease(duration_s=SHORT_S, version="other")
    await asyncio.wait_for(task, WAIT_S)
    assert store.stored.holder == ""


async def test_a_leader_that_cannot_renew_ends_and_a_successor_takes_over(
    store: MemoryLease, start: Start
) -> None:
    first = start("a")
    await elected(first)
    second = start("b")
    store.is_down = True
    (task, _) = start.tasks  # type: ignore[attr-defined] # see the fixture
    await asyncio.wait_for(task, WAIT_S)
    assert not first.leads()
    assert not second.leads()
    store.is_down = False
    await elected(second)
    assert store.stored is not None
    assert (store.stored.holder, store.stored.transitions) == ("b", 1)


async def test_a_short_outage_of_the_store_costs_no_leader(
    store: MemoryLease, start: Start
) -> None:
    candidate = Candidate(store, identity="a", duration_s=60.0)
    task = asyncio.create_task(candidate.run())
    await elected(candidate)
    store.is_down = True
    await candidate.resign()
    assert candidate.leads()
    assert not task.done()
    task.cancel()


async def test_who_is_alone_leads() -> None:
    leadership = Leadership(LeadershipSettings(), instance_id="a")
    task = asyncio.create_task(leadership.campaign("127.0.0.1:9000"))
    await asyncio.wait_for(leadership.elected(), WAIT_S)
    assert leadership.leads()
    await leadership.resign()
    assert not task.done()
    task.cancel()


def test_an_election_without_kubernetes_is_one_line_and_exit_code_1(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    child = spawn("chiasm.orchestrator", "--election-lease", "chiasm")
    wait_until(lambda: child.exit_code is not None, "exit")
    assert child.exit_code == 1
    (failure,) = [line for line in child.last_lines(100) if "start_failed" in line]
    assert json.loads(failure)["error"].startswith("no access to Kubernetes")
    assert not any("Traceback" in line for line in child.last_lines(100))
