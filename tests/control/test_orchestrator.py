"""A real orchestrator with real member processes, which are stopped, killed and brought back."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module

import grpc
import pytest
from control.processes import WAIT_S, Spawn, Watch, address, wait_until
from control.refusals import refusal
from typer.testing import CliRunner

from chiasm import errors
from chiasm.child import Child
from chiasm.cli import app
from chiasm.membership import MemberInfo, MemberState, Role, Topology
from chiasm.orchestrator.members import Membership
from chiasm.orchestrator.servicer import OrchestratorServicer
from chiasm.transport.membership import ANSWER_TIMEOUT_S, Member, TopologyWatcher
from chiasm.transport.topology import member_to_proto
from chiasm.types import Modality
from chiasm.v1 import control_pb2, control_pb2_grpc

LONG_LEASE_MS, SETTLING_MS, SHORT_LEASE_MS = 60_000, 4_000, 1_000
"""The second one is long enough for all members to come back within it."""


def orchestrator(spawn: Spawn, lease_ms: int, bind: str = "127.0.0.1:0", *flags: str) -> Child:
    return spawn("chiasm.orchestrator", "--bind", bind, "--lease-ms", str(lease_ms), *flags)


def info(name: str, **changes: object) -> MemberInfo:
    fields = {"member_id": name, "role": Role.GATEWAY, "address": f"{name}:1", **changes}
    return MemberInfo(**fields)  # type: ignore[arg-type] # the fields under test


async def seen(watcher: TopologyWatcher, addresses: set[str]) -> Topology:
    """Waits until exactly these addresses are in the topology, all ready."""
    return await watcher.wait_for(
        lambda t: {m.address for m in t.members if m.is_ready} == addresses == _all(t),
        timeout_s=WAIT_S,
        what=f"{addresses}",
    )


def _all(topology: Topology) -> set[str]:
    return {m.address for m in topology.members}


async def test_members_join_with_their_shards_and_leave_on_sigterm(
    spawn: Spawn, watch: Watch
) -> None:
    control = address(orchestrator(spawn, LONG_LEASE_MS))
    pools = [spawn("fake_service", "--orchestrator", control, "--shards", f"{s}/2") for s in (0, 1)]
    watcher = watch(control)
    topology = await seen(watcher, {address(p) for p in pools})
    for shard, pool in enumerate(pools):
        (holder,) = topology.holders(Modality.TEXT, shard)
        assert holder.address == address(pool)
        assert holder.metrics_address.startswith("127.0.0.1:")
    assert pools[0].end(WAIT_S)
    assert pools[0].exit_code == 0
    # The orchestrator settles for a minute here, in which a watcher drops nobody: a new one sees.
    topology = await seen(watch(control), {address(pools[1])})
    assert topology.missing(Modality.TEXT) == (0,)


def test_the_orchestrator_ends_within_the_grace_it_was_given(spawn: Spawn) -> None:
    control = orchestrator(spawn, LONG_LEASE_MS, "127.0.0.1:0", "--grace-s", "3.5")
    address(control)
    assert control.end(WAIT_S)
    lines = [json.loads(line) for line in control.last_lines(20) if line.startswith("{")]
    (draining,) = [line for line in lines if line["event"] == "draining"]
    assert draining["grace_s"] == 3.5


async def test_kill_removes_a_member_long_before_its_lease(spawn: Spawn, watch: Watch) -> None:
    control = address(orchestrator(spawn, LONG_LEASE_MS))
    pools = [spawn("fake_service", "--orchestrator", control) for _ in range(2)]
    await seen(watch(control), {address(p) for p in pools})
    pools[0].signal(signal.SIGKILL)
    await seen_afresh(watch, control, {address(pools[1])})


async def seen_afresh(watch: Watch, control: str, addresses: set[str]) -> None:
    """Waits until a watcher that knows nothing yet sees exactly these."""
    async with asyncio.timeout(WAIT_S):
        while True:
            watcher = watch(control)
            topology = await watcher.wait_for(
                lambda t: bool(t.instance_id), timeout_s=WAIT_S, what="a topology"
            )
            if _all(topology) == addresses:
                return
            await asyncio.sleep(0.05)


async def test_stopped_member_loses_its_lease_and_comes_back(spawn: Spawn, watch: Watch) -> None:
    control = address(orchestrator(spawn, SHORT_LEASE_MS))
    hung, alive = (spawn("fake_service", "--orchestrator", control) for _ in range(2))
    both = {address(hung), address(alive)}
    watcher = watch(control)
    await seen(watcher, both)
    hung.signal(signal.SIGSTOP)
    await seen(watcher, {address(alive)})
    hung.signal(signal.SIGCONT)
    await seen(watcher, both)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
async def test_watcher_loses_nobody_while_the_orchestrator_restarts(
    spawn: Spawn, watch: Watch, signum: signal.Signals
) -> None:
    first = orchestrator(spawn, SETTLING_MS)
    control = address(first)
    members = {address(spawn("fake_service", "--orchestrator", control)) for _ in range(2)}
    watcher = watch(control)
    before = await seen(watcher, members)
    published: list[set[str]] = []
    watcher.subscribe(lambda topology: published.append(_all(topology)))

    first.signal(signum)
    wait_until(lambda: first.exit_code is not None, "the orchestrator is gone")
    assert _all(watcher.current) == members
    address(orchestrator(spawn, SETTLING_MS, control))
    after = await watcher.wait_for(
        lambda t: t.instance_id != before.instance_id and not t.settling,
        timeout_s=WAIT_S,
        what="the new orchestrator",
    )
    assert after.members == before.members
    assert all(topology == members for topology in published)
    assert published


async def test_nobody_is_lost_while_the_orchestrator_stands_still(
    spawn: Spawn, watch: Watch
) -> None:
    """So long that its members give up on the streams they have."""
    stuck = orchestrator(spawn, SETTLING_MS)
    control = address(stuck)
    members = {address(spawn("fake_service", "--orchestrator", control)) for _ in range(2)}
    watcher = watch(control)
    await seen(watcher, members)
    known = await watcher.wait_for(
        lambda t: not t.settling, timeout_s=WAIT_S, what="the end of settling"
    )
    published: list[Topology] = []
    watcher.subscribe(published.append)

    stuck.signal(signal.SIGSTOP)
    await asyncio.sleep(ANSWER_TIMEOUT_S + 2.0)
    stuck.signal(signal.SIGCONT)
    after = await watcher.wait_for(
        lambda t: t.version > known.version and not t.settling, timeout_s=WAIT_S, what="settled"
    )
    assert after.members == known.members
    assert all(topology.members == known.members for topology in published)
    assert published[0].settling


async def test_changes_are_sent_at_once(spawn: Spawn, watch: Watch) -> None:
    control = address(orchestrator(spawn, LONG_LEASE_MS))
    member = Member(control, info("m"))
    member.start()
    watcher = watch(control)
    for state in (MemberState.LOADING, MemberState.READY, MemberState.LOADING):
        member.update(state=state)
        await watcher.wait_for(
            lambda t, state=state: [m.state for m in t.members] == [state],
            timeout_s=WAIT_S,
            what=f"{state}",
        )
    await member.leave()
    await seen_afresh(watch, control, set())
    assert watcher.current.members[0].state is MemberState.DRAINING


async def test_bad_reports_are_refused_with_their_field(spawn: Spawn) -> None:
    control = address(orchestrator(spawn, LONG_LEASE_MS, "127.0.0.1:0", "--max-members", "1"))
    async with grpc.aio.insecure_channel(control) as channel:
        refused = partial(refusal, channel, timeout_s=WAIT_S)
        good = member_to_proto(info("a"))
        nameless = await refused(control_pb2.MemberReport(address="a:1"))
        assert isinstance(nameless, errors.InvalidArgument)
        assert nameless.field == "member_id"
        renamed = await refused(good, member_to_proto(info("b")))
        assert isinstance(renamed, errors.InvalidArgument)
        assert renamed.field == "member_id"

        held = control_pb2_grpc.OrchestratorStub(channel).Join()
        await held.write(good)
        assert (await held.read()).lease_ms == LONG_LEASE_MS
        assert isinstance(await refused(member_to_proto(info("b"))), errors.ResourceExhausted)
        held.cancel()


def servicer(max_watchers: int = 4) -> tuple[Membership, OrchestratorServicer]:
    members = Membership(instance_id="i", lease_s=60.0, max_members=100, now=0.0)
    return members, OrchestratorServicer(
        members, lease_s=60.0, max_members=100, max_watchers=max_watchers
    )


async def test_slow_watcher_gets_the_latest_topology_only() -> None:
    members, service = servicer()
    topologies = service.WatchTopology(control_pb2.WatchTopologyRequest(), None)
    assert (await anext(topologies)).version == 1
    for index in range(50):
        members.report(info(f"m{index}"), session=1, now=0.0)
    latest = await anext(topologies)
    assert (latest.version, len(latest.members)) == (51, 50)
    waiting = asyncio.ensure_future(anext(topologies))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    waiting.cancel()


async def test_watchers_are_bounded_and_end_with_the_service() -> None:
    _, service = servicer(max_watchers=1)
    request = control_pb2.WatchTopologyRequest()
    topologies = service.WatchTopology(request, None)
    await anext(topologies)
    with pytest.raises(errors.ResourceExhausted):
        await anext(service.WatchTopology(request, None))
    end = asyncio.ensure_future(anext(topologies))
    await asyncio.sleep(0)
    await service.close()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(end, WAIT_S)


async def test_waiting_for_what_does_not_come_is_unavailable() -> None:
    watcher = TopologyWatcher("")
    watcher.start()
    with pytest.raises(errors.Unavailable, match="a decoder is not available"):
        await watcher.wait_for(lambda t: bool(t.decoders()), timeout_s=0.05, what="a decoder")
    await watcher.close()


def test_status_command_follows_changes_into_a_pipe(spawn: Spawn) -> None:
    control = address(orchestrator(spawn, LONG_LEASE_MS))
    command = [sys.executable, "-m", "chiasm", "status", "--watch", "--endpoint", control]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        try:
            at = address(spawn("fake_service", "--orchestrator", control))
            assert watching.stdout is not None
            for line in watching.stdout:  # ends with the test's own time at the latest
                if at in line:
                    break
        finally:
            watching.kill()


def test_status_command_shows_the_members(spawn: Spawn) -> None:
    control = address(orchestrator(spawn, LONG_LEASE_MS))
    at = address(spawn("fake_service", "--orchestrator", control, "--shards", "0,2/3"))

    def shown() -> dict[str, object]:
        result = CliRunner().invoke(app, ["status", "--endpoint", control, "--json"])
        assert result.exit_code == 0
        topology = json.loads(result.stdout)
        assert topology["complete"] is False
        return topology["members"][0] if topology["members"] else {}

    wait_until(lambda: shown().get("state") == "ready", "the member is ready")
    held = {"modality": "text", "num_shards": 3, "shards": [0, 2], "max_shards": 0, "weights": "w"}
    assert (shown()["address"], shown()["shard_sets"]) == (at, [held])
    table = CliRunner().invoke(app, ["status", "--endpoint", control], env={"COLUMNS": "200"})
    for text in ("expert-pool", at, "text 0,2/3", " w ", "no server for text 1"):
        assert text in table.stdout


async def test_following_ends_with_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    command, written = import_module("chiasm.cli.status"), list[Topology]()

    def write(topology: Topology) -> None:
        if written:
            raise BrokenPipeError
        written.append(topology)

    monkeypatch.setattr(command, "_write_json", write)
    watcher = TopologyWatcher("")
    following = asyncio.create_task(command._follow(watcher, as_json=True))
    await asyncio.sleep(0)
    assert written == [watcher.current]
    watcher._publish(Topology(instance_id="changed"))
    with pytest.raises(BrokenPipeError):
        await asyncio.wait_for(following, WAIT_S)
