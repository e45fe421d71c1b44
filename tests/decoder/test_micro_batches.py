"""Micro-batches: cut without loss, chosen by what was measured, with the results of whole steps."""

from __future__ import annotations

from random import Random

import pytest
from decoder.test_scheduler import sequence
from hypothesis import given
from hypothesis import strategies as st

from chiasm.services.decoder.micro_batches import RECHECK_STEPS, MicroBatchPolicy, halves
from chiasm.services.decoder.scheduler import Chunk


def chunks(*sizes: int) -> list[Chunk]:
    return [Chunk(sequence=sequence(n + 3, 1), start=2, num_tokens=n) for n in sizes]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_halves_are_the_same_tokens_in_the_same_order(sizes: list[int]) -> None:
    whole = chunks(*sizes)
    first, second = halves(whole)
    found = [(id(c.sequence), i) for c in [*first, *second] for i in range(c.start, c.stop)]
    assert found == [(id(c.sequence), i) for c in whole for i in range(c.start, c.stop)]
    sizes_found = [sum(c.num_tokens for c in half) for half in (first, second)]
    assert 0 <= sizes_found[0] - sizes_found[1] <= 1


def run(policy: MicroBatchPolicy, whole_ns: int, split_ns: int, wait: float, steps: int) -> float:
    """Plays steps that take so long; returns the share that was split of the last half."""
    step, splits = chunks(*[1] * 8), []
    for _ in range(steps):
        split = policy.should_split(step)
        took = split_ns if split else whole_ns
        policy.record(step, was_split=split, step_ns=took, wait_ns=int(took * wait))
        splits.append(split)
    return sum(splits[steps // 2 :]) / (steps - steps // 2)


@pytest.mark.parametrize(("whole_ns", "split_ns", "expected"), [(100, 70, 1), (100, 130, 0)])
def test_the_faster_way_is_taken(whole_ns: int, split_ns: int, expected: int) -> None:
    share = run(MicroBatchPolicy(), whole_ns * 10**4, split_ns * 10**4, wait=0.5, steps=400)
    assert share == pytest.approx(expected, abs=2 / RECHECK_STEPS)


def test_nothing_is_tried_where_little_is_waited() -> None:
    policy = MicroBatchPolicy()
    assert run(policy, 10**6, 10**5, wait=0.02, steps=300) == 0


def test_the_choice_follows_a_change() -> None:
    policy = MicroBatchPolicy()
    assert run(policy, 10**6, 2 * 10**6, wait=0.5, steps=200) < 0.1
    assert run(policy, 10**6, 5 * 10**5, wait=0.5, steps=RECHECK_STEPS * 20) > 0.8


def test_a_request_alone_is_never_split() -> None:
    policy, one, random = MicroBatchPolicy(), chunks(40), Random(0)
    for _ in range(20):
        assert not policy.should_split(one)
        policy.record(one, was_split=False, step_ns=random.randint(10, 20), wait_ns=9)
