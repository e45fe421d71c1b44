"""How the loop goes round: on changes, past bad steps, and only while it may act."""

from __future__ import annotations

import asyncio
from unittest.mock import AsyncMock, Mock

import pytest
from control.scaling_world import NUM_SHARDS, world

from chiasm.orchestrator.loop import ScalingLoop
from chiasm.orchestrator.placer import Placer
from chiasm.orchestrator.planner import Planner
from chiasm.orchestrator.types import Pool


async def test_the_loop_goes_round_on_changes_and_survives_a_bad_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = world(text_experts=1)
    changes: asyncio.Queue[None] = asyncio.Queue()
    steps = 0

    async def place() -> None:
        nonlocal steps
        steps += 1
        if steps == 1:
            raise RuntimeError("a defect")

    async def changed(_: object) -> None:
        await changes.get()

    log = Mock()
    monkeypatch.setattr("chiasm.orchestrator.loop.log", log)
    monkeypatch.setattr(system.loop, "place", place)
    running = asyncio.create_task(system.loop.run(changed))
    async with asyncio.timeout(10):
        for expected in range(1, 4):
            while steps < expected:  # noqa: ASYNC110  # a step is told by nobody
                await asyncio.sleep(0.01)
            changes.put_nowait(None)
    running.cancel()
    log.exception.assert_called_once_with("step_failed")


async def test_shards_are_placed_though_the_backend_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    system = world(text_experts=2, min_text=2)
    await system.step(6)
    before = len(system.scaled)
    asked = asyncio.Event()

    async def replicas() -> dict[Pool, int]:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    changes: asyncio.Queue[None] = asyncio.Queue()

    async def changed(_: object) -> None:
        await changes.get()

    monkeypatch.setattr(system, "replicas", replicas)
    running = asyncio.create_task(system.loop.run(changed))
    async with asyncio.timeout(10):
        await asked.wait()
        system.kill("text-experts-1")
        changes.put_nowait(None)
        survivor = system.processes["text-experts-2"]
        while survivor.told != tuple(range(NUM_SHARDS)):  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert len(system.scaled) == before


async def test_who_stops_being_the_leader_while_the_backend_is_asked_places_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = world(text_experts=1)
    leads, asked, placed = True, asyncio.Event(), AsyncMock()
    loop = ScalingLoop(
        system.membership,
        planner=Planner({}),
        placer=Placer(system, min_holders=1, rebalance_s=60.0, clock=lambda: system.now),
        servers=system,
        backend=None,
        applies=False,
        interval_s=2.0,
        may_act=lambda: leads,
    )

    async def decide() -> None:
        nonlocal leads
        leads = False
        asked.set()

    monkeypatch.setattr(loop, "decide", decide)
    monkeypatch.setattr(loop, "place", placed)
    running = asyncio.create_task(loop.run(AsyncMock()))
    async with asyncio.timeout(10):
        await asked.wait()
    await asyncio.sleep(0.05)
    running.cancel()
    placed.assert_not_called()
