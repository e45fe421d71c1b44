"""The loop, over members, expert servers and a backend in memory, on a clock of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from control.scaling_world import CONFIG, NUM_SHARDS, TEXT, VISION, World, world

from chiasm import errors
from chiasm.load import ExpertLoad, GatewayLoad
from chiasm.membership import Role
from chiasm.orchestrator.placer import REPEAT_S
from chiasm.orchestrator.scaling import ScalingSettings
from chiasm.orchestrator.types import Pool
from chiasm.types import Modality


async def test_an_empty_pool_is_placed_once_all_its_servers_are_there() -> None:
    system = world(text_experts=2, min_text=2)
    late = system.processes.pop("text-experts-2")
    await system.step(2)
    assert not any(p.told for p in system.processes.values()), "the second one is expected"
    system.processes["text-experts-2"] = late
    await system.step(4)
    assert sorted(map(len, system.shards().values())) == [2, 2]
    assert system.is_covered
    assert not any(p.dropped for p in system.processes.values()), "nothing was loaded in vain"


async def test_an_expected_server_that_does_not_come_is_not_waited_for_for_ever() -> None:
    system = world(text_experts=2, min_text=2)
    del system.processes["text-experts-2"]
    await system.step(12)
    assert system.is_covered


async def test_a_newcomer_takes_over_shards_and_none_is_ever_without_a_holder() -> None:
    system = world(text_experts=1)
    await system.step(3)
    system.start(TEXT)
    system.wanted[TEXT] = 2
    await system.step(3)
    assert system.is_covered
    for _ in range(4):
        await system.step()
        assert system.is_covered
    assert sorted(map(len, system.shards().values())) == [2, 2]


async def test_shards_of_the_last_holder_go_to_a_survivor_at_once() -> None:
    system = world(text_experts=2, min_text=2)
    await system.step(6)
    system.kill("text-experts-1")
    await system.loop.place()  # on the change of the topology, not on the next decision
    assert system.processes["text-experts-2"].told == tuple(range(NUM_SHARDS))
    await system.step(4)
    assert system.is_covered


async def test_shards_of_a_server_that_does_not_get_on_go_to_a_survivor() -> None:
    system = world(text_experts=2, min_text=2)
    await system.step(6)
    stuck = system.processes["text-experts-1"]
    stuck.is_stuck = True
    await system.step(6)
    assert system.shards()["text-experts-2"] == tuple(range(NUM_SHARDS))
    stuck.is_stuck = False
    for _ in range(6):
        await system.step()
        assert system.is_covered
    assert stuck.held.shards


async def test_a_server_that_says_it_leaves_hands_over_and_none_is_ever_without_a_holder() -> None:
    system = world(text_experts=2, min_text=2)
    await system.step(6)
    leaving = system.processes["text-experts-1"]
    leaving.info = replace(leaving.info, leaving=True)
    for _ in range(6):
        await system.step()
        assert system.is_covered
    assert system.shards() == {
        "text-experts-1": (),
        "text-experts-2": tuple(range(NUM_SHARDS)),
    }
    system.kill("text-experts-1")
    await system.step(4)
    assert system.is_covered


async def test_the_last_server_keeps_its_shards_though_it_leaves() -> None:
    system = World(dict.fromkeys(Pool, CONFIG), scales=False)
    only = system.processes[system.start(TEXT)]
    await system.step(6)
    only.info = replace(only.info, leaving=True)
    await system.step(6)
    assert system.is_covered
    heir = system.start(TEXT)
    for _ in range(8):
        await system.step()
        assert system.is_covered
    assert system.shards()[heir] == tuple(range(NUM_SHARDS))


async def test_fixed_servers_are_left_alone() -> None:
    system = world(text_experts=1)
    fixed = system.start(TEXT, max_shards=0, shards=(0, 1, 2))
    system.wanted[TEXT] = 2
    await system.step(8)
    assert system.processes[fixed].told == ()
    assert 3 in system.processes["text-experts-1"].told
    assert system.is_covered


async def test_a_new_orchestrator_moves_nothing_and_goes_on_from_the_old_epoch() -> None:
    system = world(text_experts=2, min_text=2)
    await system.step(6)
    before = system.shards()
    for process in system.processes.values():
        process.epoch = 1000
    system.start_orchestrator()
    await system.step(8)
    assert system.shards() == before
    system.kill("text-experts-1")
    await system.step(8)
    assert system.processes["text-experts-2"].epoch > 1000
    assert system.is_covered


async def test_an_epoch_that_cannot_be_counted_on_from_is_not_taken_over() -> None:
    system = world(text_experts=2, min_text=2)
    await system.step(6)
    odd, other = system.processes["text-experts-1"], system.processes["text-experts-2"]
    odd.epoch, other.told = 2**64 - 1, ()
    system.start_orchestrator()
    await system.step(20)
    assert 0 < other.epoch < 2**62


async def test_members_that_come_back_are_waited_for() -> None:
    system = world(text_experts=2, min_text=2)
    await system.step(6)
    late = system.processes.pop("text-experts-2")
    system.start_orchestrator()
    await system.step(2)
    told = system.processes["text-experts-1"].told
    system.processes["text-experts-2"] = late
    await system.step(4)
    assert system.processes["text-experts-1"].told == told
    assert not any(p.dropped for p in system.processes.values())


async def test_streams_that_broke_while_the_orchestrator_stood_still_move_nothing() -> None:
    system = world(text_experts=2, min_text=2)
    await system.step(6)
    before, assigned = system.shards(), system.processes["text-experts-1"].told
    system.now += 8.0
    for address in system.processes:
        system.membership.end(address, session=1, now=system.now)
    late = system.processes.pop("text-experts-2")
    await system.step()
    assert system.membership.topology.settling
    system.processes["text-experts-2"] = late
    await system.step(8)
    assert not system.membership.topology.settling
    assert system.shards() == before
    assert system.processes["text-experts-1"].told == assigned


async def test_a_server_that_does_not_answer_is_asked_again() -> None:
    system = world(text_experts=1)
    system.unreachable.add("text-experts-1")
    await system.step(4)
    system.unreachable.clear()
    await system.step(6)
    assert system.is_covered


async def test_full_servers_make_room_for_the_shards_of_a_dead_one() -> None:
    system = world(text_experts=0, min_text=2)
    for _ in range(3):
        system.start(TEXT, max_shards=2)
    system.wanted[TEXT] = 3
    await system.step(8)
    assert system.is_covered
    held = system.shards()
    alone = next(
        name
        for name, shards in held.items()
        if any(sum(s in other for other in held.values()) == 1 for s in shards)
    )
    system.wanted[TEXT] = 2
    system.kill(alone)
    await system.step(6)
    assert system.is_covered
    assert all(len(shards) == 2 for shards in system.shards().values())


async def test_a_shard_that_one_server_cannot_load_goes_to_another() -> None:
    system = world(text_experts=3, min_text=3)
    await system.step(8)
    victim, *others = sorted(system.processes)
    lost = set(system.processes[victim].held.shards)
    lost -= {s for name in others for s in system.processes[name].held.shards}
    assert lost
    unable = system.processes[others[0]]
    unable.broken = set(range(NUM_SHARDS)) - set(unable.held.shards)
    system.wanted[TEXT] = 2
    system.kill(victim)
    await system.step(40)
    assert system.is_covered
    assert set(system.processes[others[1]].held.shards) >= lost


async def test_a_shard_that_nobody_else_can_take_is_tried_again_where_it_failed() -> None:
    system = world(text_experts=1)
    (server,) = system.processes.values()
    server.load_steps, server.broken = 5, {NUM_SHARDS - 1}
    await system.step(5 * NUM_SHARDS + 5)
    assert set(server.held.shards) == set(range(NUM_SHARDS - 1))
    server.broken = set()
    await system.step(round(REPEAT_S / 2) + 10)
    assert system.is_covered


async def test_servers_with_other_weights_are_placed_by_themselves() -> None:
    """They take over once they can do without the others, which keep all shards until then."""
    system = world(text_experts=2, min_text=2)
    await system.step(6)
    others = system.start(TEXT, weights="other")
    await system.step(2)
    topology = system.membership.topology
    assert topology.pool(Modality.TEXT).weights == ""
    await system.step(6)
    assert system.shards()[others] == tuple(range(NUM_SHARDS)), "none is left to those of before"
    assert sum(map(len, system.shards().values())) == 2 * NUM_SHARDS
    for name in [name for name in system.shards() if name != others]:
        system.kill(name)
    await system.step()
    topology = system.membership.topology
    assert topology.pool(Modality.TEXT).weights == "other"
    assert topology.covered(Modality.TEXT)


async def test_a_busy_pool_grows_by_the_decision() -> None:
    system = world(text_experts=1)
    await system.step(6)
    total = 0.0
    for _ in range(4):
        total += 1.9
        system.processes["text-experts-1"].load = ExpertLoad(
            dispatches_total=round(total), compute_s_total=total
        )
        await system.step()
    assert system.wanted[TEXT] == 2


async def test_encoder_and_vision_pool_sleep_and_are_woken_together() -> None:
    system = world(text_experts=1, vision_experts=1, encoder=1)
    gateway = GatewayLoad()
    system.add(Role.GATEWAY, gateway)
    await system.step(20)
    assert (system.wanted[Pool.ENCODER], system.wanted[VISION]) == (0, 0)
    assert not system.shards(Modality.VISION)
    assert system.wanted[TEXT] == 1
    system.processes[Role.GATEWAY].load = GatewayLoad(waiting_encoder=1)
    await system.step()
    assert (system.wanted[Pool.ENCODER], system.wanted[VISION]) == (1, 1)
    await system.step(8)
    (shards,) = system.shards(Modality.VISION).values()
    assert shards == tuple(range(NUM_SHARDS))


async def test_without_the_backends_word_nothing_is_scaled_but_shards_are_placed() -> None:
    system = world(text_experts=2)
    await system.step(4)
    system.is_away = True
    system.kill("text-experts-1")
    await system.step(20)
    assert system.scaled == []
    assert system.is_covered


async def test_without_a_backend_shards_are_placed() -> None:
    system = World(dict.fromkeys(Pool, CONFIG), scales=False)
    system.start(TEXT)
    await system.step(10)
    assert system.is_covered
    assert system.loop.decision is not None
    assert not system.loop.decision.replicas


def test_every_pool_has_its_settings() -> None:
    settings = ScalingSettings.model_validate(
        {"text_experts_max": 5, "encoder_target_s": 0.5, "scale_up_at": 0.7}
    )
    configs = settings.pool_configs(report_s=2.0)
    assert configs[TEXT].max_replicas == 5
    assert configs[Pool.ENCODER].target_s == 0.5
    assert {config.up for config in configs.values()} == {0.7}
    assert configs[VISION].min_replicas == 0


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"scale_down_at": 0.9}, "scale_down_at"),
        ({"decoder_min": 3, "decoder_max": 2}, "decoder_min"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, float], field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        ScalingSettings.model_validate(settings).pool_configs(report_s=2.0)
    assert refused.value.field == field


async def test_a_pool_that_was_woken_waits_for_all_its_servers_again() -> None:
    system = world(text_experts=2, min_text=2)
    await system.step(6)
    for address in ("text-experts-1", "text-experts-2"):
        system.kill(address)
    await system.step()
    system.start(TEXT)
    await system.step(2)
    assert not system.processes["text-experts-3"].told, "another one is expected"
    system.start(TEXT)
    await system.step(4)
    assert sorted(map(len, system.shards().values())) == [2, 2]
