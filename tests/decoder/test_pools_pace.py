"""A server that is slow all the time, or fails, is passed over, and tried again."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
from decoder.pool_servers import FaultyBank, Pool, dispatch, pool_of, sleep

from chiasm import errors
from chiasm.model.moe import Partial
from chiasm.services.decoder import dispatches, pace
from chiasm.services.decoder.dispatches import PoolUnavailable
from chiasm.services.decoder.pace import FORGOTTEN_S, MOST, SLOW, Pace, is_slow

ALL = (0, 1, 2, 3)
SLOW_S = 1.0
"""Several times what a busy machine takes for a small dispatch."""
MOST_ROUNDS = 8
"""Of dispatches until a slow server is known to be slow."""


def refuse(_: list[Partial]) -> list[Partial]:
    raise errors.ResourceExhausted("too busy")


async def ask_often(pool: Pool, num_times: int) -> None:
    for seed in range(num_times):
        await pool.check(4, seed)


async def passed_over(pool: Pool, bank: FaultyBank) -> None:
    """Returns when this server was not asked for many dispatches in a row, which else alternate.

    A stall of the other one, as a busy machine has them, may draw one more to it.
    """
    for _ in range(MOST_ROUNDS):
        before = bank.num_calls
        await ask_often(pool, 12)
        if bank.num_calls == before:
            return
    pytest.fail("it is asked for ever")


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("hook", [sleep(SLOW_S), refuse], ids=["slow", "refuses"])
async def test_the_other_one_is_asked(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, hook: object, bad: int
) -> None:
    monkeypatch.setattr(pace, "FORGOTTEN_S", 3600.0)
    async with pool_of(tiny_checkpoint, ALL, ALL) as pool:
        bank = pool.servers[bad].bank
        await ask_often(pool, 4)  # one after the other: both are known
        bank.hook = hook  # type: ignore[assignment]
        await passed_over(pool, bank)
        bank.hook, before = None, bank.num_calls
        monkeypatch.setattr(pace, "FORGOTTEN_S", 0.5)
        await asyncio.sleep(0.6)
        await ask_often(pool, 3)  # as nothing is known of it, it is asked before who is
        assert bank.num_calls > before


def test_one_stall_does_not_make_a_server_slow() -> None:
    known = Pace()
    for _ in range(20):
        known.add(8, 0.01, now=0.0)
    known.add(8, 10.0, now=0.0)
    assert not is_slow(known.mean_s(8, now=0.0), 0.01)
    for _ in range(8):
        known.add(8, 0.01 * MOST * SLOW, now=0.0)
    assert is_slow(known.mean_s(8, now=0.0), 0.01)


def test_sizes_have_paces_of_their_own_and_are_forgotten() -> None:
    known = Pace()
    known.add(8, 0.01, now=100.0)
    known.add(100, 0.5, now=101.0)
    assert known.mean_s(15, now=101.0) == 0.01
    assert known.mean_s(64, now=101.0) == 0.5
    assert known.mean_s(16, now=101.0) == 0.0
    assert known.mean_s(8, now=100.0 + FORGOTTEN_S) == 0.0
    known.add(8, 0.9, now=100.0 + FORGOTTEN_S)
    assert known.mean_s(8, now=100.0 + FORGOTTEN_S) == 0.9


def test_who_failed_is_slower_than_any_for_a_while() -> None:
    known = Pace()
    known.add(8, 0.01, now=100.0)
    known.fail(now=101.0)
    known.add(8, 0.01, now=102.0)
    assert known.mean_s(8, now=102.0) == math.inf
    assert is_slow(math.inf, 30.0)
    assert not is_slow(math.inf, math.inf)
    assert known.mean_s(8, now=101.0 + FORGOTTEN_S) == 0.01


async def test_more_tokens_have_more_time(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what takes a server longer than the timeout would be asked for again and again."""
    monkeypatch.setattr(dispatches, "TIMED_TOKENS", 4)
    async with pool_of(tiny_checkpoint, ALL, attempt_timeout_s=1.0) as pool:
        pool.servers[0].bank.hook = sleep(2.0)
        with pytest.raises(PoolUnavailable):
            await pool.ask(dispatch(pool.config, 4))
        await pool.reachable(1)
        await pool.check(80, 1)
