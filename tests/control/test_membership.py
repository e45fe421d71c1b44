"""The member table and topologies, without processes and with a clock of our own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chiasm import errors
from chiasm.membership import MemberInfo, MemberState, Role, ShardSet, Topology
from chiasm.orchestrator.members import RETURN_S, Membership
from chiasm.transport import topology as wire
from chiasm.types import Modality
from chiasm.v1 import control_pb2

LEASE_S = 6.0


def member(name: str, role: Role = Role.GATEWAY, **changes: object) -> MemberInfo:
    base = MemberInfo(member_id=name, role=role, address=f"{name}:1", state=MemberState.READY)
    return replace(base, **changes)  # type: ignore[arg-type] # the fields under test


def pool(
    name: str, modality: Modality, *shards: int, of: int, weights: str = "", **changes: object
) -> MemberInfo:
    held = ShardSet(modality=modality, num_shards=of, shards=shards, weights=weights)
    return member(name, Role.EXPERT_POOL, shard_sets=(held,), **changes)


def table(now: float = 0.0, max_members: int = 10) -> Membership:
    return Membership(instance_id="i", lease_s=LEASE_S, max_members=max_members, now=now)


def join(members: Membership, *names: str, now: float) -> None:
    """Each by a session of its own, numbered from 0."""
    for session, name in enumerate(names):
        members.report(member(name), session=session, now=now)


def ids(topology: Topology) -> list[str]:
    return [m.member_id for m in topology.members]


def tick(members: Membership, start: float, end: float) -> list[str]:
    """Lets time pass as the orchestrator does; returns who expired."""
    step, now, gone = members.tick_s, start, []
    while now < end:
        now = min(now + step, end)
        gone += [m.member_id for m in members.expire(now)]
    return gone


class TestLeases:
    def test_member_that_reports_stays_and_a_silent_one_goes(self) -> None:
        members = table()
        members.report(member("silent"), session=1, now=0.0)
        members.report(member("alive"), session=2, now=0.0)
        assert tick(members, 0.0, 5.9) == []
        members.report(member("alive"), session=2, now=5.9)
        assert tick(members, 5.9, 6.0) == ["silent"]
        assert ids(members.topology) == ["alive"]
        assert tick(members, 6.0, 11.8) == []
        assert tick(members, 11.8, 11.9) == ["alive"]

    def test_expired_member_comes_back_with_its_next_report(self) -> None:
        members = table()
        members.report(member("a"), session=1, now=0.0)
        tick(members, 0.0, 7.0)
        members.report(member("a"), session=1, now=7.0)
        assert ids(members.topology) == ["a"]

    def test_time_in_which_the_orchestrator_stood_still_ends_no_lease(self) -> None:
        members = table()
        members.report(member("a"), session=1, now=0.0)
        tick(members, 0.0, 3.0)
        assert members.expire(1000.0) == ()
        assert tick(members, 1000.0, 1002.9) == []
        assert tick(members, 1002.9, 1003.1) == ["a"]

    def test_settles_after_one_lease(self) -> None:
        members = table(now=100.0)
        tick(members, 100.0, 105.9)
        assert members.topology.settling
        tick(members, 105.9, 106.0)
        assert not members.topology.settling

    def test_an_orchestrator_that_stood_still_settles_again(self) -> None:
        """Members gave up on their streams meanwhile, and the ends of those come first."""
        members = table()
        tick(members, 0.0, 7.0)
        join(members, "a", "b", "c", now=7.0)
        assert not members.topology.settling
        for index, name in enumerate(("a", "b", "c")):
            members.end(name, session=index, now=15.0)
            assert members.topology.settling
        members.report(member("a"), session=7, now=15.5)
        assert tick(members, 15.0, 18.0) == []
        members.report(member("a"), session=7, now=18.0)
        assert tick(members, 18.0, 21.4) == []
        assert members.topology.settling
        tick(members, 21.4, 21.7)
        assert not members.topology.settling

    def test_one_report_read_first_does_not_make_the_others_lost(self) -> None:
        members = table()
        tick(members, 0.0, 7.0)
        join(members, "a", "b", now=7.0)
        members.report(member("a"), session=0, now=15.0)
        assert members.topology.settling
        members.end("b", session=1, now=15.0)
        assert members.topology.settling
        assert tick(members, 15.0, 21.7) == ["a"]

    def test_cut_off_from_all_it_settles_until_a_lease_after_somebody_is_heard(self) -> None:
        members = table()
        members.report(member("a"), session=1, now=0.0)
        tick(members, 0.0, 5.9)
        members.report(member("a"), session=1, now=5.9)
        assert tick(members, 5.9, 100.0) == ["a"]
        assert members.topology.settling
        for now in (100.0, 102.0, 104.0):
            members.report(member("b"), session=2, now=now)
            assert tick(members, now, now + 1.9) == []
            assert members.topology.settling
        members.report(member("b"), session=2, now=106.0)
        tick(members, 105.9, 106.1)
        assert not members.topology.settling
        assert ids(members.topology) == ["b"]

    def test_the_last_one_to_say_goodbye_is_not_waited_for(self) -> None:
        members = table()
        members.report(member("a", state=MemberState.DRAINING), session=1, now=0.0)
        tick(members, 0.0, 5.0)
        members.end("a", session=1, now=5.0)
        tick(members, 5.0, 6.1)
        assert not members.topology.settling


class TestSessions:
    def test_a_detached_member_has_time_to_come_back(self) -> None:
        members = table()
        join(members, "back", "gone", "newer", now=0.0)
        members.report(member("newer"), session=7, now=0.5)
        for index, name in enumerate(("back", "gone", "newer")):
            members.detach(name, session=index, now=1.0)
        assert tick(members, 0.0, 0.9 + RETURN_S) == []
        members.report(member("back"), session=8, now=0.9 + RETURN_S)
        assert tick(members, 0.9 + RETURN_S, 1.0 + RETURN_S) == ["gone"]
        assert ids(members.topology) == ["back", "newer"]

    def test_a_detached_member_has_no_more_than_its_lease(self) -> None:
        members = table()
        members.report(member("a"), session=1, now=0.0)
        members.detach("a", session=1, now=5.0)
        assert tick(members, 0.0, 6.0) == ["a"]

    def test_end_of_the_stream_removes_at_once(self) -> None:
        members = table()
        members.report(member("a"), session=1, now=0.0)
        members.end("a", session=1, now=0.0)
        assert ids(members.topology) == []

    def test_old_stream_of_a_reconnected_member_does_not_remove_it(self) -> None:
        members = table()
        members.report(member("a"), session=1, now=0.0)
        members.report(member("a"), session=2, now=1.0)
        members.end("a", session=1, now=1.0)
        assert ids(members.topology) == ["a"]
        members.end("a", session=2, now=1.0)
        assert ids(members.topology) == []

    def test_version_grows_with_changes_only(self) -> None:
        members = table()
        versions = [members.topology.version]
        for report in (member("b"), member("a"), member("a"), member("a", address="a:2")):
            members.report(report, session=1, now=0.0)
            versions.append(members.topology.version)
        members.end("nobody", session=1, now=0.0)
        versions.append(members.topology.version)
        assert versions == [1, 2, 3, 3, 4, 4]
        assert ids(members.topology) == ["a", "b"]


class TestRefusals:
    def test_full_table_still_renews_those_in_it(self) -> None:
        members = table(max_members=1)
        members.report(member("a"), session=1, now=0.0)
        with pytest.raises(errors.ResourceExhausted):
            members.report(member("b"), session=2, now=0.0)
        members.report(member("a", address="a:2"), session=1, now=1.0)
        assert [m.address for m in members.topology.members] == ["a:2"]

    def test_second_cut_of_a_pool_is_refused_while_the_first_is_there(self) -> None:
        members = table()
        members.report(pool("old", Modality.TEXT, 0, of=2), session=1, now=0.0)
        members.report(pool("vision", Modality.VISION, 0, of=4), session=2, now=0.0)
        with pytest.raises(errors.FailedPrecondition) as refused:
            members.report(pool("new", Modality.TEXT, 0, of=4), session=3, now=0.0)
        assert refused.value.field == "shard_sets[0].num_shards"
        members.end("old", session=1, now=0.0)
        members.report(pool("new", Modality.TEXT, 0, of=4), session=3, now=0.0)
        assert members.topology.num_shards(Modality.TEXT) == 4

    def test_a_decoder_may_cut_its_inner_pools_as_it_likes(self) -> None:
        members = table()
        members.report(pool("p", Modality.TEXT, 0, of=2), session=1, now=0.0)
        inside = ShardSet(modality=Modality.TEXT, num_shards=1, shards=(0,))
        decoder = member("d", Role.DECODER, shard_sets=(inside,))
        members.report(decoder, session=2, now=0.0)
        assert members.topology.num_shards(Modality.TEXT) == 2


class TestWeights:
    """Servers with other weights are no replicas."""

    def held(self, topology: Topology, shard: int) -> list[str]:
        return [m.member_id for m in topology.holders(Modality.TEXT, shard)]

    def test_the_larger_of_two_kinds_counts(self) -> None:
        topology = Topology(
            members=(
                pool("a", Modality.TEXT, 0, 1, of=2, weights="int4"),
                pool("b", Modality.TEXT, 0, 1, of=2, weights="int8"),
                pool("c", Modality.TEXT, 0, 1, of=2, weights="int4"),
                pool("v", Modality.VISION, 0, of=1, weights="int8"),
            )
        )
        assert topology.pool(Modality.TEXT).weights == "int4"
        assert self.held(topology, 1) == ["a", "c"]
        assert topology.pool(Modality.VISION).weights == "int8"
        assert topology.covered(Modality.VISION)

    def test_those_that_have_every_shard_go_first(self) -> None:
        """So a pool changes its weights at once, when the new ones can do without the old."""
        old = [pool(f"old{s}", Modality.TEXT, s, of=3, weights="int4") for s in range(3)]
        new = pool("new", Modality.TEXT, 0, 1, of=3, weights="int8")
        assert Topology(members=(*old, new)).pool(Modality.TEXT).weights == "int4"
        assert Topology(members=(*old[1:], new)).missing(Modality.TEXT) == (0,)
        new = pool("new", Modality.TEXT, 0, 1, 2, of=3, weights="int8")
        left = Topology(members=(*old[1:], new))
        assert left.pool(Modality.TEXT).weights == "int8"
        assert left.covered(Modality.TEXT)
        draining = replace(new, state=MemberState.DRAINING)
        assert Topology(members=(*old, draining)).pool(Modality.TEXT).weights == "int4"

    def test_an_unknown_pool_has_none(self) -> None:
        assert Topology().pool(Modality.TEXT).weights == ""


class TestCoverage:
    def test_holders_are_ready_expert_servers(self) -> None:
        topology = Topology(
            members=(
                pool("a", Modality.TEXT, 0, 1, of=3),
                pool("b", Modality.TEXT, 1, 2, of=3),
                pool("c", Modality.TEXT, 2, of=3, state=MemberState.LOADING),
                pool("d", Modality.VISION, 0, of=1, state=MemberState.DRAINING),
            )
        )
        held = [[m.member_id for m in topology.holders(Modality.TEXT, s)] for s in range(3)]
        assert held == [["a"], ["a", "b"], ["b"]]
        assert topology.covered(Modality.TEXT)
        assert topology.missing(Modality.VISION) == (0,)
        assert not topology.covered(Modality.VISION)

    def test_a_pool_nobody_serves_is_not_covered(self) -> None:
        assert Topology().num_shards(Modality.TEXT) == 0
        assert not Topology().covered(Modality.TEXT)

    @pytest.mark.parametrize("colocated", [True, False])
    @pytest.mark.parametrize("lost", [None, "g", "e", "d", "t1", "v0"])
    def test_complete_needs_every_part(self, colocated: bool, lost: str | None) -> None:
        inside = tuple(ShardSet(modality=m, num_shards=2, shards=(0, 1)) for m in Modality)
        members = [
            member("g", Role.GATEWAY),
            member("e", Role.VISION_ENCODER),
            member("d", Role.DECODER, shard_sets=inside if colocated else ()),
        ]
        if not colocated:
            members += [pool(f"t{i}", Modality.TEXT, i, of=2) for i in range(2)]
            members += [pool("v0", Modality.VISION, 0, 1, of=2)]
        left = [m for m in members if m.member_id != lost]
        assert Topology(members=tuple(left)).is_complete() == (len(left) == len(members))


class TestMerge:
    def test_settling_adds_and_updates_but_removes_nobody(self) -> None:
        known = Topology(instance_id="old", settling=False, members=(member("a"), member("b")))
        fresh = member("b", address="b:2")
        update = Topology(instance_id="new", version=3, members=(fresh, member("c")))
        merged = known.merged(update)
        assert ids(merged) == ["a", "b", "c"]
        assert merged.members[1].address == "b:2"
        assert (merged.instance_id, merged.version) == ("new", 3)
        assert merged.merged(replace(update, settling=False)).members == update.members


class TestWire:
    def test_topology_survives_the_wire(self) -> None:
        whole = Topology(
            instance_id="i",
            version=7,
            settling=False,
            members=(
                member("a", metrics_address="a:9", leaving=True),
                pool("b", Modality.VISION, 0, 3, of=5, state=MemberState.LOADING),
                member("c", Role.DECODER, state=MemberState.DRAINING),
                member("d", Role.VISION_ENCODER),
            ),
        )
        assert wire.topology_from_proto(wire.topology_to_proto(whole)) == whole

    @pytest.mark.parametrize(
        ("field", "change"),
        [
            ("member_id", {"member_id": ""}),
            ("member_id", {"member_id": "x" * 257}),
            ("address", {"address": ""}),
            ("metrics_address", {"metrics_address": "x" * 257}),
            ("role", {"role": 0}),
            ("state", {"state": 9}),
            ("shard_sets[0].modality", {"shard_sets": [{"num_shards": 1}]}),
            ("shard_sets[0].num_shards", {"shard_sets": [{"modality": 1, "num_shards": 0}]}),
            (
                "shard_sets[0].num_shards",
                {"shard_sets": [{"modality": 1, "num_shards": wire.MAX_SHARDS + 1}]},
            ),
            (
                "shard_sets[0].shards",
                {"shard_sets": [{"modality": 1, "num_shards": 2, "shards": [2]}]},
            ),
            (
                "shard_sets[0].shards",
                {"shard_sets": [{"modality": 2, "num_shards": 2, "shards": [1, 0]}]},
            ),
            ("shard_sets", {"shard_sets": [{"modality": 1, "num_shards": 2}] * 2}),
        ],
    )
    def test_bad_reports_name_the_field(self, field: str, change: dict[str, object]) -> None:
        good = {"member_id": "a", "address": "a:1", "role": 1, "state": 1}
        wire.member_from_proto(control_pb2.MemberReport(**good))  # type: ignore[arg-type] # literal
        with pytest.raises(errors.InvalidArgument) as refused:
            wire.member_from_proto(control_pb2.MemberReport(**{**good, **change}))  # type: ignore[arg-type] # literal
        assert refused.value.field == field

    def test_watchers_leave_out_members_of_an_unknown_kind(self) -> None:
        topology = wire.topology_to_proto(Topology(members=(member("a"), member("b"))))
        topology.members[0].role = 99
        assert ids(wire.topology_from_proto(topology)) == ["b"]
