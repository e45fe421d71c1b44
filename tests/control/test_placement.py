"""Placement of shards on servers: coverage, balance, and as few moves as possible."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chiasm.orchestrator.placement import (
    LOAD_FLOOR,
    MIN_GAIN,
    TOLERANCE,
    Placement,
    Server,
    next_assignment,
    place,
    uncovered,
)

ROUNDING = 1e-6

quick = settings(max_examples=60)


def server(name: str, held: set[int] | None = None, capacity: int = 64) -> Server:
    return Server(server_id=name, capacity=capacity, held=frozenset(held or ()))


def fixed(name: str, held: set[int]) -> Server:
    return Server(server_id=name, capacity=0, held=frozenset(held))


def again(servers: list[Server], placement: Placement) -> list[Server]:
    """The servers once they hold what they were given."""
    return [
        s
        if s.is_fixed
        else Server(
            server_id=s.server_id, capacity=s.capacity, held=frozenset(placement[s.server_id])
        )
        for s in servers
    ]


def weights(loads: list[float]) -> list[float]:
    total = sum(loads)
    return [max(w, LOAD_FLOOR * total / len(loads)) for w in loads] if total else [1.0] * len(loads)


def shares(loads: list[float], servers: list[Server], placement: Placement) -> dict[str, float]:
    """Load of each server."""
    held = {s.server_id: s.held if s.is_fixed else placement[s.server_id] for s in servers}
    count = [sum(shard in shards for shards in held.values()) for shard in range(len(loads))]
    each = weights(loads)
    return {name: sum(each[s] / count[s] for s in shards) for name, shards in held.items()}


@st.composite
def pools(draw: st.DrawFn, *, roomy: bool = False) -> tuple[list[float], list[Server]]:
    """Loads of up to 9 shards, and up to 5 servers that hold something or nothing."""
    num_shards = draw(st.integers(1, 9))
    loads = draw(
        st.lists(st.integers(0, 1000).map(float), min_size=num_shards, max_size=num_shards)
    )
    servers = []
    for index in range(draw(st.integers(1, 5))):
        held = draw(st.sets(st.integers(0, num_shards - 1)))
        capacity = num_shards if roomy else draw(st.integers(1, num_shards))
        is_fixed = not roomy and bool(held) and draw(st.booleans())
        servers.append(server(f"s{index}", held, 0 if is_fixed else capacity))
    return loads, servers


@quick
@given(pools(), st.integers(1, 3))
def test_every_shard_is_covered_within_the_capacities(
    pool: tuple[list[float], list[Server]], min_holders: int
) -> None:
    loads, servers = pool
    placement = place(loads, servers, min_holders=min_holders)
    missing = uncovered(len(loads), placement, servers)
    for s in servers:
        if not s.is_fixed:
            assert len(placement[s.server_id]) <= s.capacity
    # A shard may be left out only when all the room is taken by shards that have one holder.
    held = [shard for shards in placement.values() for shard in shards]
    if missing:
        assert len(held) == sum(s.capacity for s in servers)
        assert len(held) == len(set(held))


@quick
@given(pools(), st.integers(1, 3))
@example(
    pool=(
        [0.0, 1.0],
        [
            fixed("s0", {0, 1}),
            server("s1", capacity=2),
            server("s2", capacity=1),
            server("s3", {1}, capacity=1),
        ],
    ),
    min_holders=3,
)
def test_the_same_input_moves_nothing(
    pool: tuple[list[float], list[Server]], min_holders: int
) -> None:
    loads, servers = pool
    first = place(loads, servers, min_holders=min_holders)
    assert place(loads, again(servers, first), min_holders=min_holders) == first
    assert place(loads, reversed(servers), min_holders=min_holders) == first


@quick
@given(pools(roomy=True))
def test_balanced_within_the_stated_bound(pool: tuple[list[float], list[Server]]) -> None:
    loads, servers = pool
    placement = place(loads, servers)
    load = shares(loads, servers, placement)
    mean = sum(weights(loads)) / len(servers)
    count = [sum(s in shards for shards in placement.values()) for s in range(len(loads))]
    largest = max(w / c for w, c in zip(weights(loads), count, strict=True))
    bound = max((1 + TOLERANCE) * mean, mean + (1 + MIN_GAIN) * largest)
    assert max(load.values()) <= bound * (1 + ROUNDING)
    assert all(placement.values()), "nobody is idle"


@quick
@given(pools(roomy=True), st.data())
def test_a_lost_server_moves_only_what_it_must(
    pool: tuple[list[float], list[Server]], data: st.DataObject
) -> None:
    loads, servers = pool
    placed = again(servers, place(loads, servers))
    lost = data.draw(st.sampled_from(placed))
    left = [s for s in placed if s is not lost]
    if not left:
        return
    after = place(loads, left, tolerance=math.inf)
    orphans = lost.held - frozenset[int]().union(*(s.held for s in left))
    assert not uncovered(len(loads), after, left)
    loads_again = sorted(shard for s in left for shard in set(after[s.server_id]) - s.held)
    assert loads_again == sorted(orphans)


def test_only_a_hot_shard_gets_more_holders() -> None:
    servers = [server(f"s{i}", {i}) for i in range(4)]
    placement = place([9.0, 1.0, 1.0, 1.0], servers)
    assert sum(0 in shards for shards in placement.values()) >= 3
    assert sum(len(shards) for shards in placement.values()) <= 4 + 3, "only the hot one is doubled"


@pytest.mark.parametrize(("num_servers", "min_holders"), [(2, 1), (3, 1), (4, 2), (3, 3)])
def test_holders_that_are_not_needed_go(num_servers: int, min_holders: int) -> None:
    servers = [server(f"s{i}", set(range(12))) for i in range(num_servers)]
    placement = place([1.0] * 12, servers, min_holders=min_holders)
    held = sorted(shard for shards in placement.values() for shard in shards)
    assert held == sorted([*range(12)] * min_holders)
    assert {len(shards) for shards in placement.values()} == {12 * min_holders // num_servers}


def test_what_others_hold_too_is_given_up_before_anything_is_loaded() -> None:
    assert place([1.0, 1.0], [server("a", {0, 1}), server("b", {1})]) == {"a": (0,), "b": (1,)}


def test_a_server_keeps_its_only_shard() -> None:
    servers = [server("a", {0}), server("b", {0}), server("c", {0})]
    assert place([1.0], servers) == {"a": (0,), "b": (0,), "c": (0,)}


def test_servers_beyond_the_shards_replicate_the_hottest() -> None:
    placement = place([1.0, 5.0], [server("a", {0}), server("b", {1}), server("c"), server("d")])
    assert placement["c"] == (1,)
    assert placement["d"] == (1,)


def test_a_new_server_takes_its_part_and_no_more() -> None:
    held = [{0, 1, 2, 3}, {4, 5, 6, 7}]
    servers = [*(server(f"s{i}", h) for i, h in enumerate(held)), server("s2")]
    placement = place([1.0] * 8, servers)
    assert sorted(s for shards in placement.values() for s in shards) == list(range(8))
    assert sorted(len(shards) for shards in placement.values()) == [2, 3, 3]


def test_full_servers_give_up_replicas_for_an_orphan() -> None:
    servers = [server("a", {0, 1}, 2), server("b", {1, 2}, 2)]
    placement = place([1.0] * 4, servers)
    assert not uncovered(4, placement, servers)
    assert {s for shards in placement.values() for s in shards} == {0, 1, 2, 3}


def test_fixed_servers_count_and_are_left_alone() -> None:
    servers = [fixed("f", {0, 1}), server("a")]
    placement = place([1.0, 1.0, 1.0], servers)
    assert "f" not in placement
    assert 2 in placement["a"]


def test_nobody_to_place_on() -> None:
    assert place([1.0, 1.0], []) == {}
    assert uncovered(2, {}, []) == (0, 1)


@pytest.mark.parametrize("min_holders", [2, 3])
def test_least_number_of_holders(min_holders: int) -> None:
    placement = place([1.0] * 6, [server(f"s{i}") for i in range(3)], min_holders=min_holders)
    for shard in range(6):
        assert sum(shard in shards for shards in placement.values()) >= min_holders


@quick
@given(pools(roomy=True), pools(roomy=True))
def test_no_shard_is_without_a_holder_on_the_way(
    before: tuple[list[float], list[Server]], other: tuple[list[float], list[Server]]
) -> None:
    """From any placement to any other: two assignments a move, and never a gap."""
    loads, servers = before
    loaded = {name: frozenset(shards) for name, shards in place(loads, servers).items()}
    changed = [*other[0], *loads][: len(loads)]
    joined = [server("new"), *again(servers, place(loads, servers))]
    leaving = joined[-1].server_id if len(joined) > 2 else ""
    target: Mapping[str, tuple[int, ...]] = {
        **place(changed, [s for s in joined if s.server_id != leaving]),
        **({leaving: ()} if leaving else {}),
    }
    loaded["new"] = frozenset()
    for _ in range(2):
        ready = frozenset(name for name, shards in loaded.items() if shards)
        step = next_assignment(target, loaded, ready, dict.fromkeys(target, len(loads)))
        grown = {name: loaded[name] | set(shards) for name, shards in step.items()}
        for shard in range(len(loads)):
            # What is dropped may be gone before anything that is new has come.
            assert any(shard in loaded[n] and shard in step[n] for n in step)
        assert all(set(target[n]) <= grown[n] for n in target)
        loaded = {name: frozenset(shards) for name, shards in step.items()}
    assert {name: tuple(sorted(s)) for name, s in loaded.items()} == dict(target)


def test_what_a_slow_newcomer_has_not_loaded_stays_where_it_is() -> None:
    target = {"old": (0,), "new": (1,)}
    both = frozenset({"old", "new"})
    loaded = {"old": frozenset({0, 1}), "new": frozenset[int]()}
    room = {"old": 2, "new": 2}
    assert next_assignment(target, loaded, both, room) == {"old": (0, 1), "new": (1,)}
    loaded["new"] = frozenset({1})
    ready = frozenset({"old"})
    assert next_assignment(target, loaded, ready, room) == {"old": (0, 1), "new": (1,)}
    assert next_assignment(target, loaded, both, room) == target


def test_no_server_is_ever_given_more_than_it_may_hold() -> None:
    """a and b are full and change places, by way of c, which holds what both give up."""
    target = {"a": (1,), "b": (0,), "c": (0, 1)}
    loaded = {"a": frozenset({0}), "b": frozenset({1}), "c": frozenset({0, 1})}
    room = {"a": 1, "b": 1, "c": 2}
    everybody = frozenset(loaded)
    assert next_assignment(target, loaded, everybody, room) == target
    # Without c nobody may drop anything, and nothing new fits.
    waiting = {"a": (0,), "b": (1,), "c": (0, 1)}
    assert next_assignment(target, loaded, frozenset({"a", "b"}), room) == waiting


def test_the_least_number_of_holders_is_kept_where_servers_are_full() -> None:
    """A busy shard with holders to spare gives one up."""
    held = [{0}, {0}, {0}, {0}, {1}, {2}, {2}]
    servers = [server(f"s{i}", shards, capacity=1) for i, shards in enumerate(held)]
    placement = place([10.0, 1.0, 1.0], servers, min_holders=2)
    holders = [sum(shard in shards for shards in placement.values()) for shard in range(3)]
    assert holders == [3, 2, 2]


def test_a_barred_shard_goes_to_another_server() -> None:
    barred = Server(server_id="a", capacity=9, barred=frozenset({1}))
    placement = place([1.0, 1.0, 1.0], [barred, server("b", {0, 2})])
    assert 1 in placement["b"]
    assert 1 not in placement["a"]
    assert placement["a"]
