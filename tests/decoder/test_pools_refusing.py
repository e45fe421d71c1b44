"""A decoder's pool whose servers are there and refuse: what waits, and what is given up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from decoder.pool_servers import WAIT_S, dispatch, pool_of

from chiasm.model.moe import Partial
from chiasm.services.decoder import dispatches
from chiasm.services.decoder.dispatches import PoolUnavailable

ALL, FIRST, REST = (0, 1, 2, 3), (0,), (1, 2, 3)


def out_of_memory(_: list[Partial]) -> list[Partial]:
    raise MemoryError


def broken(_: list[Partial]) -> list[Partial]:
    raise ValueError("a defect")


async def test_a_pool_that_goes_on_refusing_is_left_alone_for_a_moment(
    tiny_checkpoint: Path,
) -> None:
    """Long before the dispatch's own time is up, so that other requests go on; then it is asked
    again."""
    async with pool_of(tiny_checkpoint, ALL, ALL, timeout_s=10 * WAIT_S) as pool:
        for server in pool.servers:
            server.bank.hook = out_of_memory
        with pytest.raises(PoolUnavailable, match="out of memory"):
            await asyncio.wait_for(pool.ask(dispatch(pool.config, 20)), WAIT_S)
        assert not pool.remote.is_covered
        for server in pool.servers:
            server.bank.hook = None
        async with asyncio.timeout(WAIT_S):
            while not pool.remote.is_covered:  # noqa: ASYNC110  # by the clock
                await asyncio.sleep(0.05)
        await pool.check(20, 1)


async def test_a_server_that_is_busy_for_a_moment_is_waited_for(tiny_checkpoint: Path) -> None:
    async with pool_of(tiny_checkpoint, ALL) as pool:
        (server,) = pool.servers

        def once(found: list[Partial]) -> list[Partial]:
            server.bank.hook = None
            return out_of_memory(found)

        server.bank.hook = once
        await pool.check(20, 1)


async def test_one_shards_busy_server_does_not_make_anothers_refusal_final(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shard has a holder that is well; of the rest, the only one is busy."""
    monkeypatch.setattr(dispatches, "REFUSED_S", WAIT_S)  # three pauses, on a machine that stalls
    async with pool_of(tiny_checkpoint, FIRST, FIRST, REST) as pool:
        defect, _, busy = pool.servers
        left = [3]

        def for_a_while(found: list[Partial]) -> list[Partial]:
            left[0] -= 1
            return out_of_memory(found) if left[0] >= 0 else found

        defect.bank.hook, busy.bank.hook = broken, for_a_while
        for seed in range(4):
            left[0] = 3
            await pool.check(20, seed)
