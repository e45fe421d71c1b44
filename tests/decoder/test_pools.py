"""A decoder's pool before real expert servers: the same bits by every way, whatever fails."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from decoder.pool_servers import (
    MAX_TOKENS,
    WAIT_S,
    Pool,
    Server,
    assert_same,
    count,
    dispatch,
    hedges,
    pool_of,
    sent_by,
    sleep,
)

from chiasm import errors
from chiasm.model.moe import Partial
from chiasm.services.decoder.dispatches import PoolFailed, PoolUnavailable
from chiasm.services.decoder.hedging import BURST
from chiasm.services.decoder.lane import NUM_SLOTS
from chiasm.services.expert_pool import servicer
from chiasm.telemetry import metrics
from chiasm.transport import shared_memory
from chiasm.v1 import experts_pb2

ALL, LOW, HIGH = (0, 1, 2, 3), (0, 1), (2, 3)

ways = pytest.mark.parametrize("lane", [True, False], ids=["lane", "stream"])


@contextmanager
def stuck(*servers: Server) -> Iterator[None]:
    """Servers that compute for the time of the block."""
    go_on = threading.Event()

    def wait(found: list[Partial]) -> list[Partial]:
        go_on.wait(WAIT_S)
        return found

    for server in servers:
        server.bank.hook = wait
    try:
        yield
    finally:
        for server in servers:
            server.bank.hook = None
        go_on.set()


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@ways
async def test_the_same_bits_by_either_way(tiny_checkpoint: Path, lane: bool) -> None:
    way, other = ("lane", "stream") if lane else ("stream", "lane")
    async with pool_of(tiny_checkpoint, LOW, HIGH, lane=lane) as pool:
        before = sent_by(way), sent_by(other)
        for seed, num_tokens in enumerate([1, 1, 2, 7, 33, MAX_TOKENS]):
            await pool.check(num_tokens, seed)
        assert sent_by(way) > before[0]
        assert sent_by(other) == before[1]


@ways
async def test_answers_are_waited_for_in_any_order(tiny_checkpoint: Path, lane: bool) -> None:
    """More at once than a lane has slots: the rest takes the stream."""
    async with pool_of(tiny_checkpoint, ALL, lane=lane) as pool:
        sent = [dispatch(pool.config, 3 + i, seed=i) for i in range(3 * NUM_SLOTS)]

        def run() -> list[list[Partial]]:
            flights = [pool.remote.begin(d) for d in sent]
            order = list(range(len(sent)))
            random.Random(0).shuffle(order)
            found = {i: flights[i].result(WAIT_S) for i in order}
            return [found[i] for i in range(len(sent))]

        before = sent_by("lane"), sent_by("stream")
        for found, given in zip(await pool.on_engine(run), sent, strict=True):
            assert_same(found, pool.expected(given))
        if lane:
            assert sent_by("lane") - before[0] >= NUM_SLOTS
            assert sent_by("stream") > before[1]
            before = sent_by("lane"), sent_by("stream")
            await pool.check(2, 0)  # the slots are free again
            assert (sent_by("lane"), sent_by("stream")) == (before[0] + 1, before[1])


@ways
async def test_a_slow_server_is_hedged(tiny_checkpoint: Path, lane: bool) -> None:
    async with pool_of(
        tiny_checkpoint, ALL, ALL, lane=lane, hedge_budget=0.05, hedge_after_s=0.5
    ) as pool:
        before = hedges("sent"), hedges("won")
        with stuck(pool.servers[0]):
            for seed in range(6):  # whichever server is asked first
                await pool.check(4, seed)
        assert hedges("won") > before[1]
        # One was enough to know it: what it has not answered keeps new work away from it. Where the
        # machine stalls, the other one is hedged too.
        assert hedges("sent") - before[0] < 6


async def test_only_the_late_part_is_hedged(tiny_checkpoint: Path) -> None:
    async with pool_of(
        tiny_checkpoint, LOW, HIGH, ALL, hedge_budget=1.0, hedge_after_s=0.5
    ) as pool:
        before = hedges("won")
        with stuck(*pool.servers[:2]):
            for seed in range(4):
                await pool.check(20, seed)
        assert hedges("won") > before


async def test_without_a_budget_nothing_is_hedged(tiny_checkpoint: Path) -> None:
    async with pool_of(tiny_checkpoint, ALL, ALL, hedge_after_s=0.02) as pool:
        for server in pool.servers:
            server.bank.hook = sleep(0.1)
        before = hedges("sent")
        await pool.check(4, 0)
        assert hedges("sent") == before


async def test_an_overload_is_not_doubled(tiny_checkpoint: Path) -> None:
    """All servers are slow: the budget bounds how much is sent twice."""
    budget, num_sent = 0.05, 60
    async with pool_of(tiny_checkpoint, ALL, ALL, hedge_budget=budget, hedge_after_s=0.005) as pool:
        for server in pool.servers:
            server.bank.hook = sleep(0.005)
        before = hedges("sent"), hedges("denied")
        for seed in range(num_sent):
            await pool.check(2, seed)
        assert 0 < hedges("sent") - before[0] <= BURST + budget * num_sent
        assert hedges("denied") > before[1]


def wrong_shape(found: list[Partial]) -> list[Partial]:
    return [Partial(shard=p.shard, rows=p.rows, values=p.values[:, :-1]) for p in found]


def wrong_rows(found: list[Partial]) -> list[Partial]:
    return [Partial(shard=p.shard, rows=p.rows + 1, values=p.values) for p in found]


def wrong_type(found: list[Partial]) -> list[Partial]:
    return [Partial(shard=p.shard, rows=p.rows, values=p.values.bfloat16()) for p in found]


def wrong_shard(found: list[Partial]) -> list[Partial]:
    return [Partial(shard=p.shard + 1, rows=p.rows, values=p.values) for p in found]


def too_much(found: list[Partial]) -> list[Partial]:
    return [Partial(shard=p.shard, rows=p.rows, values=p.values.repeat(1 << 14, 1)) for p in found]


def defect(found: list[Partial]) -> list[Partial]:
    raise RuntimeError("a defect")


@ways
@pytest.mark.parametrize(
    "garbage", [wrong_shape, wrong_rows, wrong_type, wrong_shard, too_much, defect]
)
async def test_a_server_that_answers_garbage(
    tiny_checkpoint: Path, lane: bool, garbage: Callable[[list[Partial]], list[Partial]]
) -> None:
    async with pool_of(tiny_checkpoint, ALL, ALL, lane=lane) as pool:
        for broken in pool.servers:
            broken.bank.hook = garbage
            for seed in range(3):
                await pool.check(5, seed)
            broken.bank.hook = None
            await pool.reachable(2)  # after too much of it, a server is away for a while


async def test_garbage_of_the_only_server_does_not_hold_the_engine(tiny_checkpoint: Path) -> None:
    """The pool is away at once, its requests wait, and it comes back."""
    async with pool_of(tiny_checkpoint, ALL, timeout_s=60.0) as pool:
        (server,) = pool.servers
        server.bank.hook = wrong_rows
        with pytest.raises(PoolUnavailable):
            await pool.ask(dispatch(pool.config, 3))
        assert not pool.remote.is_covered
        server.bank.hook = None
        await pool.reachable(1)
        await pool.check(3, 1)


@pytest.mark.parametrize("direction", ["request", "response"])
async def test_a_payload_damaged_on_the_stream(tiny_checkpoint: Path, direction: str) -> None:
    def damage_request(request: experts_pb2.DispatchRequest) -> None:
        request.hidden.data = flip(request.hidden.data)

    def damage_response(response: experts_pb2.DispatchResponse) -> None:
        for entry in response.partials.shards:
            entry.values.data = flip(entry.values.data)

    async with pool_of(tiny_checkpoint, ALL, ALL, lane=False) as pool:
        before = count(metrics.DISPATCH_ATTEMPTS_FAILED, "text", "DATA_LOSS")
        for broken in pool.servers:
            if direction == "request":
                broken.relay.on_request = damage_request
            else:
                broken.relay.on_response = damage_response
            for seed in range(2):
                await pool.check(5, seed)
            broken.relay.on_request = broken.relay.on_response = None
        assert count(metrics.DISPATCH_ATTEMPTS_FAILED, "text", "DATA_LOSS") > before


@pytest.mark.parametrize("direction", ["request", "response"])
async def test_a_payload_damaged_in_shared_memory(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    """The first ones written, on the thread of that direction, are changed after the checksum."""
    left = [3]
    write = shared_memory.Arena.write

    def damaging(arena: shared_memory.Arena, offset: int, data: shared_memory.Bytes) -> None:
        is_answer = threading.current_thread().name == "experts"
        if left[0] and data.size and is_answer == (direction == "response"):
            left[0] -= 1
            data = np.bitwise_xor(data, 1)
        write(arena, offset, data)

    async with pool_of(tiny_checkpoint, ALL, ALL) as pool:
        monkeypatch.setattr(shared_memory.Arena, "write", damaging)
        before = count(metrics.DISPATCH_ATTEMPTS_FAILED, "text", "DATA_LOSS")
        for seed in range(4):
            await pool.check(5, seed)
        assert left == [0]
        assert count(metrics.DISPATCH_ATTEMPTS_FAILED, "text", "DATA_LOSS") > before


@ways
async def test_what_every_server_refuses_is_an_error(tiny_checkpoint: Path, lane: bool) -> None:
    async with pool_of(tiny_checkpoint, ALL, ALL, lane=lane) as pool:
        with pytest.raises(PoolFailed) as caught:
            await pool.ask(dispatch(pool.config, 3, layer=0))
        assert isinstance(caught.value.__cause__, errors.InvalidArgument)
        assert "layer" in caught.value.__cause__.message
        await pool.check(3, 1)


async def ask_while(pool: Pool, disturb: Callable[[], object], *, num_tokens: int = 6) -> None:
    """A dispatch is under way at a server that is waiting when `disturb` is called."""
    began, go_on = threading.Event(), threading.Event()

    def wait(found: list[Partial]) -> list[Partial]:
        began.set()
        go_on.wait(WAIT_S)
        return found

    for server in pool.servers:
        server.bank.hook = wait
    asked = asyncio.create_task(pool.check(num_tokens, seed=5))
    await asyncio.to_thread(began.wait, WAIT_S)
    result = disturb()
    if asyncio.iscoroutine(result):
        await result
    for server in pool.servers:
        server.bank.hook = None
    go_on.set()
    await asked


@ways
async def test_a_server_dies_while_it_computes(tiny_checkpoint: Path, lane: bool) -> None:
    async with pool_of(tiny_checkpoint, ALL, ALL, lane=lane) as pool:

        async def kill_the_busy_one() -> None:
            busy = next(s for s in pool.servers if s.bank.num_calls)
            await busy.kill()

        await ask_while(pool, kill_the_busy_one)
        for seed in range(3):
            await pool.check(4, seed)


@ways
async def test_a_server_drains_while_it_computes(tiny_checkpoint: Path, lane: bool) -> None:
    """What it has accepted is answered; what comes after goes elsewhere."""
    async with pool_of(tiny_checkpoint, ALL, ALL, lane=lane) as pool:
        drained: list[asyncio.Task[None]] = []

        async def drain_the_busy_one() -> None:
            busy = next(s for s in pool.servers if s.bank.num_calls)
            drained.append(asyncio.create_task(busy.servicer.drain()))
            await asyncio.sleep(0)

        await ask_while(pool, drain_the_busy_one)
        await drained[0]
        for seed in range(6):
            await pool.check(4, seed)


async def test_a_server_that_drains_is_connected_to_once_it_takes_work_again(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pool_of(tiny_checkpoint, ALL) as pool:
        (server,) = pool.servers
        await server.servicer.Drain(experts_pb2.DrainRequest(), None)  # type: ignore[arg-type]  # is not used
        with pytest.raises(errors.Unavailable):
            await anext(server.servicer.Dispatch(_no_requests(), None))  # type: ignore[arg-type]
        pool.watcher.publish([])
        pool.watcher.publish([(server.address, ALL)])
        await asyncio.sleep(0.3)
        assert not pool._connections()
        server.servicer._set_draining(False)
        await pool.reachable(1)
        await pool.check(4, 1)
        monkeypatch.setattr(servicer, "MAX_STREAMS", 1)
        with pytest.raises(errors.ResourceExhausted):
            await anext(server.servicer.Dispatch(_no_requests(), None))  # type: ignore[arg-type]


async def _no_requests() -> AsyncIterator[experts_pb2.DispatchRequest]:
    for request in ():
        yield request


@ways
async def test_servers_lose_shards_while_dispatches_flow(tiny_checkpoint: Path, lane: bool) -> None:
    """The topology tells late: a server is asked for what it has just dropped."""
    async with pool_of(tiny_checkpoint, ALL, ALL, lane=lane) as pool:
        before = count(metrics.DISPATCH_ATTEMPTS_FAILED, "text", "NOT_FOUND")
        for seed in range(12):
            server = pool.servers[seed % 2]
            server.bank.drop(seed % 4)
            await pool.check(6, seed)
            await pool.check(1, seed)
            await server.engine.assign(ALL, epoch=seed)
        assert count(metrics.DISPATCH_ATTEMPTS_FAILED, "text", "NOT_FOUND") > before


async def test_a_pool_without_a_holder_is_unavailable_until_there_is_one(
    tiny_checkpoint: Path,
) -> None:
    async with pool_of(tiny_checkpoint, LOW, ALL) as pool:
        low, whole = pool.servers
        pool.watcher.publish([(low.address, LOW)])
        assert not pool.remote.is_covered
        start = time.monotonic()
        with pytest.raises(PoolUnavailable, match=r"shards \[.*\] are not available"):
            await pool.ask(dispatch(pool.config, 20))
        pool.watcher.publish([])
        with pytest.raises(PoolUnavailable):
            await pool.ask(dispatch(pool.config, 1))
        assert time.monotonic() - start < 5
        pool.watcher.publish([(low.address, LOW), (whole.address, ALL)])
        await pool.reachable(2)
        await pool.check(20, 1)


@ways
async def test_a_stuck_server_without_a_replica_is_given_up(
    tiny_checkpoint: Path, lane: bool
) -> None:
    async with pool_of(tiny_checkpoint, ALL, lane=lane, attempt_timeout_s=1.0) as pool:
        (server,) = pool.servers
        with stuck(server), pytest.raises(PoolUnavailable):
            await pool.ask(dispatch(pool.config, 3))
        await pool.reachable(1)
        await pool.check(3, 1)


@pytest.mark.parametrize("seed", range(3))
async def test_random_disturbances(tiny_checkpoint: Path, seed: int) -> None:
    """Slow, garbled, dropped and dying, as dice will have it; one replica stays well."""
    dice = random.Random(seed)
    hooks = [None, wrong_shape, wrong_rows, defect, sleep(0.1)]
    async with pool_of(
        tiny_checkpoint, LOW, HIGH, ALL, ALL, hedge_budget=0.2, hedge_after_s=0.02
    ) as pool:
        for step in range(25):
            for server in pool.servers[:3]:
                server.bank.hook = dice.choice(hooks)
            if step == 12:
                await pool.servers[2].kill()
            await pool.check(dice.choice([1, 2, 9, 40]), dice.randrange(1000))
