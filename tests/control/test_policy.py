"""Scaling decisions: from demand to replicas."""

from __future__ import annotations

from dataclasses import replace

import pytest
from control.scaling_signals import CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.orchestrator.demand import Demand
from chiasm.orchestrator.observer import Observation, PoolView
from chiasm.orchestrator.policy import decide
from chiasm.orchestrator.types import Pool, PoolConfig

TICK_S = 2.0
TEXT = Pool.TEXT_EXPERTS


def view(replicas: int, demand: float | None, **changes: object) -> PoolView:
    known = Demand(replicas=demand) if demand is not None else None
    return PoolView(replicas=replicas, demand=known, **changes)  # type: ignore[arg-type]


def history(*views: PoolView, pool: Pool = TEXT) -> list[Observation]:
    return [
        Observation(at=index * TICK_S, pools={pool: v}, shard_loads={})
        for index, v in enumerate(views)
    ]


def decided(*views: PoolView, config: PoolConfig = CONFIG, pool: Pool = TEXT) -> int:
    """Replicas decided on after these views, one a tick."""
    return decide(history(*views, pool=pool), {pool: config}).replicas[pool]


def long(v: PoolView) -> list[PoolView]:
    """The same for longer than the down window."""
    return [v] * 40


# From demand to replicas.


def test_grows_at_once_by_as_much_as_it_takes() -> None:
    assert decided(view(2, 1.0), view(2, 3.0)) == 4  # 3.0 at 80 % of 4


def test_grows_within_bounds() -> None:
    high = replace(CONFIG, max_replicas=100)
    assert decided(view(2, 100.0), config=high) == 6, "by four"
    assert decided(view(8, 100.0), config=high) == 16, "doubled"
    assert decided(view(6, 100.0)) == 8, "the maximum"
    assert decided(view(0, None), config=replace(CONFIG, min_replicas=2)) == 2
    assert decided(view(1, None, floor=3)) == 3, "so many are needed to hold every shard"


def test_a_blip_is_smoothed_and_a_burst_is_not_missed() -> None:
    config = replace(CONFIG, up_tau_s=5.0)
    calm = [view(2, 0.5)] * 5
    assert decided(*calm, view(2, 3.0), config=config) == 2
    assert decided(*calm, *[view(2, 3.0)] * 3, config=config) == 3


def test_shrinks_one_by_one_and_only_after_a_long_look() -> None:
    assert decided(*[view(4, 0.5)] * 20) == 4
    assert decided(*long(view(4, 0.5))) == 3


def test_the_busiest_moment_counts_on_the_way_down() -> None:
    quiet = [view(4, 0.5)] * 14
    assert decided(*long(view(4, 0.5)), view(4, 2.0), *quiet) == 4
    assert decided(*long(view(4, 0.5)), view(4, 2.0), *quiet, *quiet, *quiet) == 3


def test_what_is_left_must_carry_the_load_without_growing_again() -> None:
    config = replace(CONFIG, up=0.5, down=0.45)
    assert decided(*long(view(2, 0.8)), config=config) == 2
    assert decided(*long(view(2, 0.45)), config=config) == 1


@pytest.mark.parametrize("replicas", range(1, 6))
@pytest.mark.parametrize("tenth", range(0, 40, 3))
def test_up_and_down_never_answer_each_other(replicas: int, tenth: int) -> None:
    """A steady demand comes to rest: no number of replicas leads back to itself."""
    seen = [replicas]
    while (after := decided(*long(view(seen[-1], tenth / 10)))) != seen[-1]:
        seen.append(after)
        assert len(seen) < 10
    assert seen in (sorted(seen), sorted(seen, reverse=True))


def test_dwell() -> None:
    grown = [*long(view(2, 1.0)), *[view(3, 3.0)] * 3]
    assert decided(*grown) == 3, "grew 4 s ago"
    assert decided(*grown, *[view(3, 3.0)] * 3) == 4
    shrunk = [*long(view(4, 0.1)), *[view(3, 0.1)] * 3]
    assert decided(*shrunk) == 3
    assert decided(*shrunk, *[view(3, 0.1)] * 8) == 2


def test_holds_on_what_is_missing() -> None:
    """Absent is not zero: neither up nor down."""
    assert decided(*long(view(4, 0.1)), view(4, None, gap="no report of a")) == 4
    assert decided(*long(view(4, 3.9)), view(4, None, gap="no report of a")) == 4
    assert decided(*[view(4, 0.1), view(4, None), view(4, None)] * 20, view(4, 0.1)) == 4
    decision = decide(history(view(4, None, gap="no report of a")), {TEXT: CONFIG})
    assert decision.reasons[TEXT] == "held: no report of a"


def test_an_obstacle_freezes_the_way_down_only() -> None:
    blocked = view(4, 0.1, obstacle="no server for shards 3")
    assert decided(*long(blocked)) == 4
    assert decided(*long(replace(blocked, demand=Demand(replicas=4.0)))) == 5


def test_replicas_are_waited_for_unless_they_were_away_for_the_whole_window() -> None:
    short = view(4, 0.1, absent=1)
    assert decided(*long(view(4, 0.1)), *[short] * 10) == 4, "it may be back in a moment"
    assert decided(*long(short)) == 3, "it cannot start"
    assert decided(*long(view(4, 0.1, absent=4))) == 4, "a pool that is away tells no demand"
    zero = replace(CONFIG, min_replicas=0)
    assert decided(*long(view(1, 0.0, absent=1, obstacle="no server")), config=zero) == 0


@pytest.mark.parametrize(("replicas", "strain", "after"), [(2, 0.6, 2), (2, 0.4, 1), (4, 0.8, 4)])
def test_what_would_be_strained_with_one_less_stays(
    replicas: int, strain: float, after: int
) -> None:
    """Otherwise it would grow again right away, and shrink again, for ever."""
    calm = replace(view(replicas, 0.1), demand=Demand(replicas=0.1, strain=strain))
    assert decided(*long(calm)) == after


def test_strain_of_fewer_replicas_counts_as_what_it_was() -> None:
    fewer = replace(view(2, 0.1), demand=Demand(replicas=0.1, strain=1.2))
    more = replace(view(4, 0.1), demand=Demand(replicas=0.1, strain=0.5))
    assert decided(*[fewer] * 10, *[more] * 30) == 3


def test_strain_adds_one_and_waits_for_it() -> None:
    strained = view(2, 1.0)
    strained = replace(strained, demand=Demand(replicas=1.0, strain=3.0))
    assert decided(strained) == 3
    assert decided(replace(strained, absent=1)) == 2
    assert decided(*long(replace(strained, demand=Demand(replicas=0.1, strain=1.5)))) == 3
    calm_since = [view(2, 0.1)] * 10
    assert decided(*long(view(2, 0.1)), strained, *calm_since) == 2


def test_zero_only_after_nobody_wanted_it_for_the_whole_window() -> None:
    config = replace(CONFIG, min_replicas=0)
    assert decided(*long(view(2, 0.0)), config=config) == 0, "all at once: shards are not needed"
    assert decided(*long(view(1, 0.0)), config=config) == 0
    assert decided(*long(view(1, 0.0, is_wanted=True)), config=config) == 1
    once = [view(1, 0.0, is_wanted=True), *[view(1, 0.0)] * 10]
    assert decided(*long(view(1, 0.0)), *once, config=config) == 1
    assert decided(*long(view(1, 0.0))) == 1, "the minimum"


def test_woken_from_zero_by_whoever_waits_whatever_else_is_missing() -> None:
    config = replace(CONFIG, min_replicas=0)
    asleep = view(0, None, gap="no report of a")
    assert decided(asleep, config=config) == 0
    assert decided(asleep, replace(asleep, is_wanted=True), config=config) == 1
    assert decided(replace(asleep, is_wanted=True, floor=2), config=config) == 2
    assert decided(view(0, 2.0, is_wanted=True), config=config) == 3, "as many as it takes"
    assert decided(replace(asleep, is_wanted=True), config=replace(config, max_replicas=0)) == 0


@settings(max_examples=100)
@given(
    st.lists(
        st.builds(
            view,
            st.integers(0, 10),
            st.none() | st.floats(0, 20),
            floor=st.integers(1, 3),
            is_wanted=st.booleans(),
            obstacle=st.sampled_from(["", "a server is missing"]),
        ),
        min_size=1,
        max_size=60,
    ),
    st.integers(0, 2),
    st.integers(2, 9),
)
def test_always_in_bounds_and_down_by_one(views: list[PoolView], low: int, high: int) -> None:
    have = views[-1].replicas
    after = decided(*views, config=replace(CONFIG, min_replicas=low, max_replicas=high))
    assert after >= low
    assert after <= max(high, have)
    assert after >= have - 1 or (after == 0 and low == 0)
    if 0 < after < have:
        assert not views[-1].obstacle
