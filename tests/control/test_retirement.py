"""How a pool gets smaller: one member hands over, is drained, and is stopped."""

from __future__ import annotations

from collections.abc import AsyncIterator

from control.scaling_world import NUM_SHARDS, TEXT, Process, World, world

from chiasm.load import ExpertLoad


async def test_a_retired_server_hands_over_is_drained_and_then_stopped() -> None:
    system = world(text_experts=2)
    await system.step(6)
    busy = dict(system.processes)
    for process in busy.values():
        process.queued = 1  # answers are on their way for a while after the drain
    drained: list[str] = []
    for _ in range(24):
        await system.step()
        drained = [a for a, p in system.processes.items() if p.is_draining]
        assert system.is_covered
        if drained:
            break
    assert len(drained) == 1
    assert (TEXT, 1) not in system.scaled, "it has something to answer yet"
    busy[drained[0]].queued = 0
    await system.step(2)
    assert system.scaled == [(TEXT, 1)]
    assert drained[0] not in system.processes
    assert system.is_covered
    await system.step(20)
    assert system.wanted[TEXT] == 1, "the minimum"


async def test_a_replica_that_cannot_start_goes_first_and_keeps_no_other_from_going() -> None:
    system = world(text_experts=2)
    await system.step(6)
    system.is_full = True
    system.wanted[TEXT] = 3
    for _ in range(20):
        await system.step()
        if system.scaled:
            break
    assert system.scaled == [(TEXT, 2)]
    assert len(system.shards()) == 2, "both that are there stay"
    await system.step(20)
    assert system.scaled == [(TEXT, 2), (TEXT, 1)]
    assert system.is_covered


async def under_load(system: World, count: int) -> AsyncIterator[None]:
    """Steps in which every process computes nearly all the time."""
    for number in range(1, count + 1):
        for process in system.processes.values():
            process.load = ExpertLoad(dispatches_total=1, compute_s_total=1.9 * number)
        await system.step()
        yield


async def drained_one(system: World) -> Process:
    """Runs an idle pool until it has drained one of its servers."""
    for _ in range(40):
        await system.step()
        for process in system.processes.values():
            if process.is_draining:
                return process
    raise AssertionError("nobody was drained")


async def test_a_drained_server_is_stopped_though_the_backend_is_away_for_a_while() -> None:
    system = world(text_experts=2)
    await system.step(6)
    system.is_stuck = True
    drained = await drained_one(system)
    system.is_away = True
    await system.step(10)
    assert drained.is_draining
    system.is_away = system.is_stuck = False
    await system.step(3)
    assert system.scaled == [(TEXT, 1)]
    assert drained not in system.processes.values()
    assert system.is_covered


async def test_a_drained_server_that_was_forgotten_takes_work_again() -> None:
    """The orchestrator that drained it is gone, and the load is back."""
    system = world(text_experts=2, min_text=1)
    await system.step(6)
    system.is_stuck = True
    drained = await drained_one(system)
    system.is_stuck = False
    system.start_orchestrator()
    async for _ in under_load(system, 80):
        assert system.is_covered
    assert not drained.is_draining
    assert drained.held.shards
    assert drained in system.processes.values()


async def test_a_retirement_is_called_off_when_the_load_is_back() -> None:
    system = world(text_experts=2)
    await system.step(6)
    for process in system.processes.values():
        assert len(process.told) == 2
    for _ in range(24):
        await system.step()
        if any(len(p.told) == NUM_SHARDS for p in system.processes.values()):
            break  # one begins to take over from the other
    async for _ in under_load(system, 6):
        pass
    assert not any(p.is_draining for p in system.processes.values())
    assert system.wanted[TEXT] >= 2
    assert all(shards for shards in system.shards().values())
