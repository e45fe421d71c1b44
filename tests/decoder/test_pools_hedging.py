"""When a slow dispatch goes to a replica too, and how often that may be."""

from __future__ import annotations

import math
import random

import pytest

from chiasm.services.decoder.hedging import (
    BURST,
    FIRST_DELAY_S,
    MIN_DELAY_S,
    MIN_SAMPLES,
    WINDOW,
    HedgePolicy,
)


def policy(budget: float = 0.05, after_s: float = 0.0) -> HedgePolicy:
    return HedgePolicy(budget=budget, after_s=after_s)


def test_few_are_later_than_the_delay() -> None:
    dice, hedging = random.Random(0), policy()
    durations = [dice.lognormvariate(-4, 0.5) for _ in range(4 * WINDOW)]
    for duration in durations:
        hedging.answered(8, duration)
    later = sum(d > hedging.delay_s(8) for d in durations) / len(durations)
    assert 0 < later < 0.03


def test_sizes_have_delays_of_their_own() -> None:
    hedging = policy()
    for _ in range(WINDOW):
        hedging.answered(1, 0.02)
        hedging.answered(512, 0.5)
    assert hedging.delay_s(1) == pytest.approx(0.02)
    assert hedging.delay_s(600) == pytest.approx(0.5)
    assert hedging.delay_s(64) == FIRST_DELAY_S


def test_a_stall_among_many_does_not_move_the_delay() -> None:
    hedging = policy()
    for i in range(WINDOW):
        hedging.answered(1, 5.0 if i == 100 else 0.02)
    assert hedging.delay_s(1) == pytest.approx(0.02)


def test_a_server_that_has_become_slow_moves_the_delay() -> None:
    hedging = policy()
    for duration in (0.02, 0.2):
        for _ in range(WINDOW):
            hedging.answered(1, duration)
    assert hedging.delay_s(1) == pytest.approx(0.2)


def test_few_samples_and_hiccups_are_no_ground() -> None:
    hedging = policy()
    for _ in range(MIN_SAMPLES - 1):
        assert hedging.delay_s(1) == FIRST_DELAY_S
        hedging.answered(1, 0.0001)
    hedging.answered(1, 0.0001)
    assert hedging.delay_s(1) == MIN_DELAY_S


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.3])
def test_the_budget_bounds_the_share(budget: float) -> None:
    hedging, num_sent = policy(budget), 5000
    num_hedged = 0
    for _ in range(num_sent):
        hedging.sent()
        num_hedged += hedging.may_hedge()
    assert budget * num_sent - 1 <= num_hedged <= budget * num_sent + BURST


def test_a_burst_is_bounded() -> None:
    hedging = policy()
    for _ in range(10000):
        hedging.sent()
    assert sum(hedging.may_hedge() for _ in range(100)) == BURST


def test_without_a_budget_there_is_no_delay_and_no_hedge() -> None:
    hedging = policy(budget=0.0, after_s=0.01)
    hedging.sent()
    assert hedging.delay_s(1) == math.inf
    assert not hedging.may_hedge()


def test_a_fixed_delay_is_taken_as_it_is() -> None:
    hedging = policy(after_s=0.25)
    for _ in range(WINDOW):
        hedging.answered(1, 0.02)
    assert hedging.delay_s(1) == hedging.delay_s(512) == 0.25
