"""From the loads that members report to the demand for each pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from control.scaling_signals import (
    ALL,
    CONFIG,
    DECODER,
    ENCODER,
    GATEWAY,
    IDLE,
    REPLICAS,
    TEXT_SERVER,
    VISION_SERVER,
    member,
    signals,
)

from chiasm.load import DecoderLoad, EncoderLoad, ExpertLoad, GatewayLoad, Load, ShardLoad
from chiasm.membership import MemberInfo, MemberState, Role, ShardSet, Topology
from chiasm.orchestrator.demand import Demand
from chiasm.orchestrator.observer import Observation, Observer
from chiasm.orchestrator.types import LoadReport, Pool, PoolConfig, Signals
from chiasm.types import Modality

TEXT = Pool.TEXT_EXPERTS


def observed(*series: Signals, config: PoolConfig = CONFIG) -> Observation:
    observer = Observer(dict.fromkeys(Pool, config))
    for moment in series:
        last = observer.observe(moment)
    return last


def warm(loads: Mapping[str, Load] = IDLE) -> list[Signals]:
    """Everybody has been there for longer than the warm-up."""
    return [signals(0.0, loads), signals(20.0, loads)]


def demand_after(
    pool: Pool, config: PoolConfig = CONFIG, *, replicas: int = 1, **loads: Load
) -> Demand:
    """The demand two seconds after everybody was idle and warm."""
    now = signals(22.0, {**IDLE, **loads}, replicas={**REPLICAS, pool: replicas})
    demand = observed(*warm(), now, config=config).pools[pool].demand
    assert demand is not None
    return demand


def test_nothing_to_do_is_no_demand() -> None:
    idle = observed(*warm(), signals(22.0, IDLE))
    assert all(v.demand == Demand(replicas=0.0) and not v.is_wanted for v in idle.pools.values())


def test_encoder_by_seconds_of_queued_patches() -> None:
    done = EncoderLoad(admitted_patches_total=1000, encoded_patches_total=1000, busy_s_total=1.0)
    assert demand_after(Pool.ENCODER, encoder=done).replicas == pytest.approx(0.5)
    queued = replace(done, admitted_patches_total=9000, queued_patches=8000, queued_items=8)
    # 4.5 s of work arrive in a second, and 8 s of work wait for at most 2 s.
    assert demand_after(Pool.ENCODER, encoder=queued).replicas == pytest.approx(4.5 + 4.0)
    one = replace(queued, queued_items=1)
    assert demand_after(Pool.ENCODER, encoder=one).replicas == pytest.approx(4.5 + 1.0)


def test_encoder_of_unknown_pace_is_judged_by_the_oldest_wait() -> None:
    waiting = EncoderLoad(queued_items=3, queued_patches=3000, oldest_wait_s=6.0)
    assert demand_after(Pool.ENCODER, encoder=waiting).strain == pytest.approx(3.0)
    alone = replace(waiting, queued_items=1)
    assert demand_after(Pool.ENCODER, encoder=alone).strain == 0.0, "it is being encoded"


def test_text_experts_by_the_dispatches_in_flight() -> None:
    load = ExpertLoad(dispatches_total=100, compute_s_total=1.5, queue_s_total=0.5)
    config = replace(CONFIG, target_s=0.001)
    demand = demand_after(TEXT, config, text=load)
    assert demand.replicas == pytest.approx(0.75 + 0.25)
    assert demand.strain == pytest.approx(5.0)
    assert demand_after(TEXT, config, replicas=4, text=load).strain == 0.0, "they stand idle"


def test_decoder_by_its_cache_and_who_waits_for_it() -> None:
    full = DecoderLoad(
        kv_tokens_capacity=1000, kv_tokens_used=800, running_requests=4, waiting_requests=6
    )
    assert demand_after(Pool.DECODER, decoder=full).replicas == pytest.approx(0.8 + 6 * 0.2)
    parked = replace(full, waiting_vision_pool=5)
    assert demand_after(Pool.DECODER, decoder=parked).replicas == pytest.approx(0.8 + 0.2)
    slow = replace(full, waiting_requests=0, steps_total=10, step_s_total=1.0)
    config = replace(CONFIG, target_s=0.05)
    assert demand_after(Pool.DECODER, config, decoder=slow).strain == pytest.approx(2.0)
    alone = replace(slow, running_requests=1)
    assert demand_after(Pool.DECODER, config, decoder=alone).strain == 0.0


def test_vision_experts_by_tokens_on_their_way() -> None:
    """The pace is known from one image; a queue at the encoder counts before its tokens come."""
    computed: dict[str, Load] = {
        "decoder": DecoderLoad(kv_tokens_capacity=1000, vision_tokens_total=500),
        "vision": ExpertLoad(dispatches_total=20, compute_s_total=1.0),
    }
    known = signals(22.0, {**IDLE, **computed})
    calm = signals(24.0, {**IDLE, **computed})
    queued = {"encoder": EncoderLoad(queued_patches=8000, queued_items=4)}
    ahead = observed(*warm(), known, calm, signals(26.0, {**IDLE, **computed, **queued}))
    demand = ahead.pools[Pool.VISION_EXPERTS].demand
    assert demand is not None
    # 2000 tokens of 2 ms each, in 2 s.
    assert demand.replicas == pytest.approx(2.0)
    assert ahead.pools[Pool.VISION_EXPERTS].is_wanted


def answered(**done: float) -> dict[str, Load]:
    """A decoder and a text server that have done something, 2 ms for each of 500 text tokens."""
    decoder = DecoderLoad(
        kv_tokens_capacity=1000,
        max_running_requests=4,
        text_tokens_total=500,
        **done,  # type: ignore[arg-type]  # numbers
    )
    return {**IDLE, "decoder": decoder, "text": ExpertLoad(dispatches_total=20, compute_s_total=1)}


def coming(loads: Mapping[str, Load], **asked: int) -> dict[Pool, float]:
    """Demand when so many answers were asked for in 2 s, and nothing else has happened since."""
    calm = signals(24.0, loads)
    now = signals(26.0, {**loads, "gateway": GatewayLoad(**asked)})
    pools = observed(*warm(), signals(22.0, loads), calm, now).pools
    return {pool: view.demand.replicas for pool, view in pools.items() if view.demand}


def test_answers_that_were_asked_for_count_before_they_come() -> None:
    """Ten in a second, each 3 s in one of 4 places, with 30 tokens of 2 ms."""
    loads = answered(plain_answers_total=10, plain_held_s_total=30.0, plain_tokens_total=300)
    demand = coming(loads, plain_answers_total=20)
    assert demand[Pool.DECODER] == pytest.approx(10 * 3 / 4)
    assert demand[TEXT] == pytest.approx(10 * 30 * 0.002)
    assert demand[Pool.ENCODER] == demand[Pool.VISION_EXPERTS] == 0


def test_answers_are_judged_by_their_kind_and_by_the_other_while_it_is_unknown() -> None:
    plain = {"plain_answers_total": 10, "plain_held_s_total": 30.0, "plain_tokens_total": 300}
    media = {"media_answers_total": 5, "media_held_s_total": 5.0, "media_tokens_total": 50}
    assert coming(answered(**plain), media_answers_total=20)[Pool.DECODER] == pytest.approx(7.5)
    both = answered(**plain, **media)
    assert coming(both, media_answers_total=20)[Pool.DECODER] == pytest.approx(10 * 1 / 4)
    assert coming(both, media_answers_total=20)[TEXT] == pytest.approx(10 * 10 * 0.002)
    mixed = coming(both, media_answers_total=20, plain_answers_total=4)
    assert mixed[Pool.DECODER] == pytest.approx(10 * 1 / 4 + 2 * 3 / 4)


def test_answers_of_unknown_cost_are_not_counted() -> None:
    demand = coming(answered(), plain_answers_total=1000, media_answers_total=1000)
    assert demand[Pool.DECODER] == demand[TEXT] == 0


def test_large_answers_are_judged_by_the_cache() -> None:
    loads = answered(plain_answers_total=10, plain_held_s_total=30.0, plain_tokens_total=300)
    decoder = loads["decoder"]
    assert isinstance(decoder, DecoderLoad)
    loads["decoder"] = replace(decoder, running_requests=1, kv_tokens_used=500)
    assert coming(loads, plain_answers_total=20)[Pool.DECODER] == pytest.approx(10 * 3 * 0.5)


def test_parked_items_are_seen_by_the_pools_behind_the_encoder() -> None:
    """Two items of 2000 patches set size and pace; then the encoder is gone, and five wait."""
    queued = EncoderLoad(queued_items=2, queued_patches=4000, admitted_patches_total=4000)
    done = EncoderLoad(admitted_patches_total=4000, encoded_patches_total=4000, busy_s_total=4.0)
    seen: dict[str, Load] = {
        "decoder": DecoderLoad(kv_tokens_capacity=1000, vision_tokens_total=1000),
        "vision": ExpertLoad(dispatches_total=20, compute_s_total=2.0),
    }
    before = [signals(22.0, {**IDLE, "encoder": queued}), signals(24.0, {**IDLE, "encoder": done})]
    known = signals(26.0, {**IDLE, "encoder": done, **seen})
    left = tuple(m for m in ALL if m is not ENCODER)
    gone = signals(28.0, {**without("encoder"), **seen}, left)
    parked = {**without("encoder"), **seen}
    parked["gateway"] = GatewayLoad(waiting_encoder=5, media_items_total=6)
    pools = observed(*warm(), *before, known, gone, signals(30.0, parked, left)).pools
    encoder, vision = pools[Pool.ENCODER].demand, pools[Pool.VISION_EXPERTS].demand
    assert encoder is not None
    assert vision is not None
    # Three items of 2 s come in a second, and five wait: each takes one encoder at most.
    assert encoder.replicas == pytest.approx(3 * 2000 * 0.001 + 5)
    # 500 tokens of 2 ms an item: three a second, and five within 2 s.
    assert vision.replicas == pytest.approx(3 * 500 * 0.002 + 5 * 500 * 0.002 / 2)


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [
        ({"gateway": GatewayLoad(waiting_encoder=1)}, {Pool.ENCODER, Pool.VISION_EXPERTS}),
        ({"encoder": EncoderLoad(queued_items=1)}, {Pool.ENCODER, Pool.VISION_EXPERTS}),
        (
            {"decoder": DecoderLoad(waiting_requests=1, waiting_vision_pool=1)},
            {Pool.VISION_EXPERTS, TEXT, Pool.DECODER},
        ),
        ({"decoder": DecoderLoad(running_requests=1)}, {TEXT, Pool.DECODER}),
        ({"gateway": GatewayLoad(waiting_decoder=1)}, {Pool.DECODER}),
    ],
)
def test_who_is_wanted(loads: Mapping[str, Load], wanted: set[Pool]) -> None:
    pools = observed(*warm(), signals(22.0, {**IDLE, **loads})).pools
    assert {pool for pool, v in pools.items() if v.is_wanted} == wanted


def without(name: str) -> dict[str, Load]:
    return {key: load for key, load in IDLE.items() if key != name}


@pytest.mark.parametrize(
    ("silent", "blind"),
    [
        ("gateway", set(Pool)),
        ("encoder", {Pool.ENCODER, Pool.VISION_EXPERTS}),
        ("decoder", {Pool.DECODER, Pool.VISION_EXPERTS}),
        ("text", {TEXT}),
        ("vision", {Pool.VISION_EXPERTS}),
    ],
)
def test_a_silent_member_blinds_the_pools_that_need_its_word(silent: str, blind: set[Pool]) -> None:
    def gaps(*series: Signals) -> dict[Pool, str]:
        return {pool: v.gap for pool, v in observed(*series).pools.items() if v.demand is None}

    found = gaps(*warm(), signals(22.0, without(silent)))
    assert set(found) == blind
    assert all(silent in gap for gap in found.values())
    stale = replace(
        signals(40.0, IDLE),
        loads={
            name: LoadReport(at=20.0 if name == silent else 40.0, load=load)
            for name, load in IDLE.items()
        },
    )
    assert set(gaps(*warm(), stale)) == blind


def test_a_young_member_neither_blinds_nor_sets_the_pace() -> None:
    young = member(Role.VISION_ENCODER, "young")
    members = (*ALL, young)
    first = EncoderLoad(queued_items=2, queued_patches=1000)
    slow = replace(first, encoded_patches_total=10, busy_s_total=5.0)
    known = EncoderLoad(admitted_patches_total=0, encoded_patches_total=1000, busy_s_total=1.0)
    before = [*warm(), signals(22.0, {**IDLE, "encoder": known})]
    quiet = signals(24.0, {**IDLE, "encoder": known}, members)
    join = signals(26.0, {**IDLE, "encoder": known, "young": first}, members)
    work = signals(28.0, {**IDLE, "encoder": known, "young": slow}, members)
    assert observed(*before, quiet).pools[Pool.ENCODER].demand is not None
    demand = observed(*before, quiet, join, work).pools[Pool.ENCODER].demand
    assert demand is not None
    assert demand.replicas == pytest.approx(1000 * 0.001 / 2.0), "its queue at the others' pace"


def test_floor_and_obstacles() -> None:
    small = member(
        Role.EXPERT_POOL,
        "text",
        shard_sets=(ShardSet(modality=Modality.TEXT, num_shards=8, shards=(0, 1), max_shards=3),),
    )
    pools = observed(*[replace(s, topology=topology(small)) for s in warm()]).pools
    assert pools[TEXT].floor == 3
    assert pools[TEXT].obstacle == "no server for shards 2,3,4,5,6,7"
    leaving = replace(TEXT_SERVER, state=MemberState.DRAINING)
    pools = observed(*[replace(s, topology=topology(leaving)) for s in warm()]).pools
    assert pools[TEXT].absent == 1
    spare = member(Role.EXPERT_POOL, "spare", Modality.TEXT)
    both = topology(TEXT_SERVER, spare)
    pools = observed(*[replace(s, topology=both) for s in warm()]).pools
    assert "more members are there" in pools[TEXT].obstacle
    settling = [replace(s, topology=replace(s.topology, settling=True)) for s in warm()]
    assert all("coming back" in v.obstacle for v in observed(*settling).pools.values())


def topology(*members: MemberInfo) -> Topology:
    return Topology(instance_id="i", settling=False, members=members)


def test_loads_of_shards_are_those_of_late() -> None:
    def worked(*seconds: float) -> dict[str, Load]:
        shards = tuple(
            ShardLoad(shard=i, tokens_total=1, compute_s_total=s) for i, s in enumerate(seconds)
        )
        return {**IDLE, "text": ExpertLoad(shards=shards)}

    first = observed(*warm(), signals(22.0, worked(3.0, 1.0)))
    assert first.shard_loads[Modality.TEXT] == pytest.approx((3.0, 1.0))
    later = observed(*warm(), signals(22.0, worked(3.0, 1.0)), signals(322.0, worked(3.0, 4.0)))
    hot, hotter = later.shard_loads[Modality.TEXT]
    assert hot < 0.1
    assert hotter == pytest.approx(3.0, abs=0.1)
    assert later.shard_loads[Modality.VISION] == (0.0, 0.0)


def test_a_member_that_starts_anew_does_not_count_backwards() -> None:
    done = EncoderLoad(admitted_patches_total=5000, encoded_patches_total=5000, busy_s_total=5.0)
    again = replace(ENCODER, member_id="again")
    members = (GATEWAY, again, DECODER, TEXT_SERVER, VISION_SERVER)
    loads = {**IDLE, "again": EncoderLoad(admitted_patches_total=10)}
    series = [*warm({**IDLE, "encoder": done}), signals(22.0, loads, members)]
    demand = observed(*series).pools[Pool.ENCODER].demand
    assert demand is not None
    assert demand.replicas == 0.0
