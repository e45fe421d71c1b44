"""How long a decoder leaves an expert server alone whose connection has ended."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from decoder.pool_servers import WAIT_S, dispatch, pool_of, sleep
from nonsense import NONSENSE, nonsense

from chiasm import errors
from chiasm.services.decoder import link
from chiasm.services.decoder.dispatches import PoolUnavailable
from chiasm.v1 import experts_pb2

ALL = (0, 1, 2, 3)


async def test_a_server_that_describes_itself_and_answers_nothing_is_left_alone(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try holds up the requests of other pools, so there is a pause before the next one."""
    monkeypatch.setattr(link, "MIN_PAUSE_S", 100 * WAIT_S)
    async with pool_of(tiny_checkpoint, ALL, lane=False, attempt_timeout_s=0.2) as pool:
        pool.servers[0].bank.hook = sleep(1.0)
        with pytest.raises(PoolUnavailable):
            await pool.ask(dispatch(pool.config, 3))
        await asyncio.sleep(10 * link.PROBE_PAUSE_S)
        assert not pool.remote.is_covered


@pytest.mark.parametrize("broken", ["Describe", "Dispatch"])
async def test_who_answers_nonsense_is_passed_over(tiny_checkpoint: Path, broken: str) -> None:
    described = experts_pb2.PoolDescription().SerializeToString()
    answers = {"Describe": described, "Dispatch": b"", broken: NONSENSE}
    async with (
        nonsense("chiasm.v1.ExpertPool", answers) as address,
        pool_of(tiny_checkpoint, ALL, lane=False) as pool,
    ):
        pool.watcher.publish([(address, ALL), (pool.servers[0].address, ALL)])
        if broken == "Dispatch":
            await pool.reachable(2)
        for seed in range(6):
            await pool.check(3, seed)
        pool.watcher.publish([(address, ALL)])
        with pytest.raises(PoolUnavailable):
            await pool.ask(dispatch(pool.config, 3))


async def test_a_lane_that_breaks_under_a_dispatch_is_unmapped(
    tiny_checkpoint: Path, without_garbage_collection: None
) -> None:
    async with pool_of(tiny_checkpoint, ALL) as pool:
        await pool.check(3, seed=0)
        assert num_arenas() > 0
        lanes = pool.servers[0].servicer._lanes
        assert lanes is not None
        lanes.close()
        with contextlib.suppress(PoolUnavailable):  # it may be reached by its stream in time
            await pool.ask(dispatch(pool.config, 3))
        async with asyncio.timeout(WAIT_S):
            while num_arenas():  # noqa: ASYNC110  # a thread of the server lets go of its end
                await asyncio.sleep(0.01)


def num_arenas() -> int:
    """Mappings of lanes in this process, at both ends."""
    return Path("/proc/self/maps").read_text().count("memfd:chiasm-arena")


@pytest.fixture
def without_garbage_collection() -> Iterator[None]:
    """An idle decoder makes no garbage, so nobody would collect any."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_pauses_double_until_a_dispatch_is_answered() -> None:
    silent, pauses = link.NoAnswer("silent"), [0.0]
    for _ in range(7):
        pauses.append(link.next_pause_s(pauses[-1], silent, has_answered=False))
    assert pauses == [0, 1, 2, 4, 8, 16, 30, 30]
    assert link.next_pause_s(30, silent, has_answered=True) < 1
    assert link.next_pause_s(30, errors.Unavailable("killed"), has_answered=False) < 1
    assert link.next_pause_s(0, errors.DataLoss("damaged"), has_answered=True) == 1
