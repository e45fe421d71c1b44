"""Followers answer with the leader's voice: streams both ways, statuses, and no circles."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from control.refusals import refusal

from chiasm import errors
from chiasm.membership import MemberInfo, Role
from chiasm.orchestrator.members import RETURN_S, Membership
from chiasm.orchestrator.relay import Relay
from chiasm.orchestrator.servicer import OrchestratorServicer
from chiasm.transport.membership import Member, TopologyWatcher
from chiasm.transport.messages import CONTROL_BYTES
from chiasm.transport.server import Server
from chiasm.transport.topology import member_to_proto
from chiasm.v1 import control_pb2, control_pb2_grpc

WAIT_S = 20.0
LEASE_S = 10.0


@dataclass
class Orchestrator:
    """One of several in this process; `leader` is the address it takes for the leader's."""

    name: str
    address: str = ""
    leader: str = ""
    leads: bool = False
    server: Server = field(init=False)
    relay: Relay = field(init=False)
    membership: Membership = field(init=False)
    servicer: OrchestratorServicer = field(init=False)
    leases: asyncio.Task[None] = field(init=False)

    async def start(self) -> None:
        self.relay = Relay(leads=lambda: self.leads, leader=lambda: self.leader)
        self.server = Server(
            services=["chiasm.v1.Orchestrator"],
            max_message_bytes=CONTROL_BYTES,
            interceptors=[self.relay],
        )
        self.membership = Membership(
            instance_id=self.name, lease_s=LEASE_S, max_members=10, now=time.monotonic()
        )
        self.servicer = OrchestratorServicer(
            self.membership, lease_s=LEASE_S, max_members=10, max_watchers=10
        )
        control_pb2_grpc.add_OrchestratorServicer_to_server(self.servicer, self.server.grpc)
        self.address = f"127.0.0.1:{await self.server.start('127.0.0.1:0')}"
        await self.server.set_serving(True)
        self.leases = asyncio.create_task(self.servicer.run_leases())

    async def has(self, *members: str) -> None:
        """Returns once it knows just these."""
        async with asyncio.timeout(WAIT_S):
            while {m.member_id for m in self.membership.topology.members} != {*members}:
                await self.servicer.changed(self.membership.topology)

    async def stop(self) -> None:
        self.leases.cancel()
        await self.relay.close()
        await self.server.grpc.stop(0)


Start = Callable[..., Any]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    running: list[Orchestrator] = []

    async def begin(name: str, **fields: Any) -> Orchestrator:
        running.append(Orchestrator(name, **fields))
        await running[-1].start()
        return running[-1]

    yield begin
    for orchestrator in running:
        if not orchestrator.leases.cancelled():
            await orchestrator.stop()


def info(name: str) -> MemberInfo:
    return MemberInfo(member_id=name, role=Role.GATEWAY, address=f"{name}:1")


async def seen(watcher: TopologyWatcher, members: set[str], instance: str) -> None:
    await watcher.wait_for(
        lambda t: t.instance_id == instance and {m.member_id for m in t.members} >= members,
        timeout_s=WAIT_S,
        what=f"{members} at {instance}",
    )


async def test_members_and_watchers_of_all_orchestrators_meet_at_the_leader(start: Start) -> None:
    leader = await start("first", leads=True)
    follower = await start("second", leader=leader.address)
    at = [leader.address, follower.address]
    async with contextlib.AsyncExitStack() as stack:
        for index, address in enumerate(at):
            member = Member(address, info(f"m{index}"))
            member.start()
            stack.push_async_callback(member.close)
        for address in at:
            watcher = TopologyWatcher(address)
            watcher.start()
            stack.push_async_callback(watcher.close)
            await seen(watcher, {"m0", "m1"}, "first")


async def test_refusals_keep_their_details(start: Start) -> None:
    leader = await start("first", leads=True)
    follower = await start("second", leader=leader.address)
    refused = await refused_by(follower, control_pb2.MemberReport(address="a:1"))
    assert isinstance(refused, errors.InvalidArgument)
    assert refused.field == "member_id"


async def refused_by(
    orchestrator: Orchestrator, report: control_pb2.MemberReport
) -> errors.ChiasmError:
    async with grpc.aio.insecure_channel(orchestrator.address) as channel:
        return await refusal(channel, report, timeout_s=WAIT_S)


@pytest.mark.parametrize("known", ["", "the other"])
async def test_without_a_leader_calls_are_refused_for_now(start: Start, known: str) -> None:
    """Also when two followers take each other for the leader: no circle."""
    first, second = await start("first"), await start("second")
    if known:
        first.leader, second.leader = second.address, first.address
    for orchestrator in (first, second):
        refused = await refused_by(orchestrator, member_to_proto(info("m")))
        assert isinstance(refused, errors.Unavailable)
        assert refused.reason == "NO_LEADER"
        assert refused.retry_after_s


async def test_a_leader_that_is_away_is_no_leader(start: Start) -> None:
    leader = await start("first", leads=True)
    follower = await start("second", leader=leader.address)
    await leader.server.grpc.stop(0)
    refused = await refused_by(follower, member_to_proto(info("m")))
    assert isinstance(refused, errors.Unavailable)
    assert refused.reason == "NO_LEADER"


async def test_followers_are_healthy_and_describe_themselves(start: Start) -> None:
    follower = await start("first")
    async with grpc.aio.insecure_channel(follower.address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", None, None)
        assert await check(b"", timeout=WAIT_S) == b"\x08\x01"  # status: SERVING


async def test_members_move_to_the_next_leader(start: Start) -> None:
    first = await start("first", leads=True)
    follower = await start("follower", leader=first.address)
    third = await start("third", leads=True)
    async with contextlib.AsyncExitStack() as stack:
        member, watcher = Member(follower.address, info("m")), TopologyWatcher(follower.address)
        for tie in (member, watcher):
            tie.start()
            stack.push_async_callback(tie.close)
        await seen(watcher, {"m"}, "first")
        await first.server.grpc.stop(0)
        follower.leader = third.address
        await seen(watcher, {"m"}, "third")


async def test_members_outlive_the_follower_that_passes_them_on(start: Start) -> None:
    leader = await start("first", leads=True)
    follower = await start("second", leader=leader.address)
    async with contextlib.AsyncExitStack() as stack:
        for name, orchestrator in (("direct", leader), ("relayed", follower)):
            member = Member(orchestrator.address, info(name))
            member.start()
            stack.push_async_callback(member.close)
        leaving = Member(follower.address, info("leaving"))
        leaving.start()
        await leader.has("direct", "relayed", "leaving")
        await leaving.leave()
        await leader.has("direct", "relayed")
        await leaving.close()
        await follower.stop()
        await asyncio.sleep(RETURN_S / 3)
        await leader.has("direct", "relayed")
        await leader.has("direct")  # as the follower does not come back


async def test_the_end_of_a_caller_reaches_the_leader(start: Start) -> None:
    leader = await start("first", leads=True)
    follower = await start("second", leader=leader.address)
    member = Member(follower.address, info("m"))
    member.start()
    await leader.has("m")
    await member.close()
    await leader.has()
