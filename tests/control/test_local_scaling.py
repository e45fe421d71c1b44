"""The launcher's side of scaling: orders over the wire, and processes that follow them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any

import grpc
import pytest
from control.processes import Spawn, address, wait_until

from chiasm import errors
from chiasm.child import Child
from chiasm.local import LocalStack, StackConfig
from chiasm.replicas import RESPAWN_S, Orders, Replicas
from chiasm.transport import status
from chiasm.v1 import control_pb2, control_pb2_grpc

TEXT, ENCODER = control_pb2.POOL_TEXT_EXPERTS, control_pb2.POOL_ENCODER
GRACE_S = 5.0


class FakeChild:
    """A process that ends when the test says so."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.exit_code: int | None = None
        self.signals: list[Signals] = []
        self.was_killed = False

    def address(self) -> str:
        return f"{self.name}:1"

    def signal(self, signum: Signals) -> None:
        self.signals.append(signum)

    def end(self, timeout_s: float) -> bool:
        self.was_killed = self.exit_code is None
        self.exit_code = self.exit_code or 0
        return not self.was_killed


class Machine:
    """Processes named `text-N` and `encoder-N`, a gateway, and a clock."""

    def __init__(self, *names: str) -> None:
        self.now = 0.0
        self.children: dict[str, Any] = {name: FakeChild(name) for name in ("gateway", *names)}
        self.replicas = Replicas(
            self.children,
            pool_of=lambda name: {"text": TEXT, "encoder": ENCODER}.get(name.partition("-")[0]),
            spawn=self._spawn,
            grace_s=GRACE_S,
            clock=lambda: self.now,
        )

    def _spawn(self, pool: int, number: int) -> None:
        name = f"{'text' if pool == TEXT else 'encoder'}-new{number}"
        self.children[name] = FakeChild(name)

    def order(self, *retired: str, **counts: int) -> None:
        pools = {"text": TEXT, "encoder": ENCODER}
        self.replicas.step(
            control_pb2.ScaleOrder(
                pools=[
                    control_pb2.PoolReplicas(pool=pools[name], replicas=count)
                    for name, count in counts.items()
                ],
                retired_addresses=[f"{name}:1" for name in retired],
            )
        )

    @property
    def going(self) -> set[str]:
        return {name for name, child in self.children.items() if child.signals}


def test_starts_what_is_missing_and_no_more() -> None:
    machine = Machine("text-0", "encoder-0")
    machine.order(text=3, encoder=1)
    machine.order(text=3, encoder=1)
    assert set(machine.children) == {"gateway", "text-0", "encoder-0", "text-new1", "text-new2"}
    assert machine.replicas.counts() == {TEXT: 3, ENCODER: 1}


def test_stops_who_was_drained_then_the_youngest() -> None:
    machine = Machine("text-0", "text-1", "text-2")
    machine.order("text-0", text=2)
    assert machine.going == {"text-0"}
    assert machine.replicas.is_ending("text-0")
    machine.order("text-0", text=1)
    assert machine.going == {"text-0", "text-2"}


def test_all_of_a_pool_may_go_and_come_back() -> None:
    machine = Machine("encoder-0")
    machine.order(encoder=0)
    assert machine.going == {"encoder-0"}
    machine.order(encoder=1)
    assert set(machine.children) == {"gateway", "encoder-0", "encoder-new1"}
    machine.children["encoder-0"].exit_code = 0
    machine.order(encoder=1)
    assert set(machine.children) == {"gateway", "encoder-new1"}


def test_who_does_not_end_in_time_is_killed() -> None:
    machine = Machine("text-0", "text-1")
    slow = machine.children["text-1"]
    machine.order(text=1)
    machine.now = GRACE_S - 1
    machine.order(text=1)
    assert not slow.was_killed
    machine.now = GRACE_S + 1
    machine.order(text=1)
    assert slow.was_killed
    assert "text-1" not in machine.children


def test_a_dead_process_is_replaced_at_once_and_a_crashing_one_ever_more_slowly() -> None:
    machine = Machine("text-0")
    machine.children["text-0"].exit_code = -9
    machine.order(text=1)
    assert set(machine.children) == {"gateway", "text-new1"}
    assert [child.name for child in machine.replicas.replaced] == ["text-0"]
    starts, number = [], 1
    while machine.now < 40:
        machine.children[f"text-new{number}"].exit_code = 1
        machine.order(text=1)
        if f"text-new{number + 1}" in machine.children:
            number += 1
            starts.append(machine.now)
        machine.now += 1.0
    pauses = [b - a for a, b in itertools.pairwise(starts)]
    assert starts[0] >= RESPAWN_S
    assert len(starts) < 6
    assert pauses == sorted(pauses)


@contextmanager
def following(orchestrator: str, **counts: int) -> Iterator[Orders]:
    pools = {"text": TEXT, "encoder": ENCODER}
    orders = Orders(orchestrator, {pools[name]: count for name, count in counts.items()})
    try:
        yield orders
    finally:
        orders.close()


def ordered(orders: Orders) -> dict[int, int]:
    return {e.pool: e.replicas for e in orders.current.pools} if orders.current else {}


def test_orders_come_and_survive_a_new_orchestrator(spawn: Spawn) -> None:
    flags = ["--scaling", "builtin", "--scaling-interval-ms", "100", "--text-experts-min", "2"]

    def start(bind: str) -> Child:
        return spawn("chiasm.orchestrator", "--bind", bind, "--lease-ms", "300", *flags)

    first = start("127.0.0.1:0")
    control = address(first)
    with following(control, text=1, encoder=3) as orders:
        wait_until(lambda: ordered(orders).get(TEXT) == 2, "the minimum is ordered")
        assert ordered(orders)[ENCODER] == 3, "nothing is known of encoders, so they stay"
        first.signal(SIGKILL)
        wait_until(lambda: first.exit_code is not None, "the orchestrator is gone")
        orders.current = None
        address(start(control))
        wait_until(lambda: ordered(orders).get(TEXT) == 2, "the order is taken up again")
        assert ordered(orders)[ENCODER] == 3


def test_an_orchestrator_that_does_not_scale_gives_no_orders(spawn: Spawn) -> None:
    control = address(spawn("chiasm.orchestrator"))
    with grpc.insecure_channel(control) as channel:
        call = control_pb2_grpc.OrchestratorStub(channel).Scale(control_pb2.ScaleReport())
        with pytest.raises(grpc.RpcError) as refused:
            next(call)
    found = status.from_rpc_error(refused.value)
    assert isinstance(found, errors.FailedPrecondition)
    assert found.reason == "SCALED_ELSEWHERE"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"colocate": True}, "autoscale"),
        ({"text_servers": 2, "max_replicas": 1}, "max_replicas"),
    ],
)
def test_a_stack_that_cannot_be_scaled(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(errors.InvalidArgument) as refused:
        StackConfig(model=tmp_path, autoscale=True, **changes)
    assert refused.value.field == field


def test_a_scaled_stack_has_servers_without_shards_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    stack = LocalStack(StackConfig(model=tmp_path, autoscale=True, text_servers=2))
    flags = {name: flags for name, _, flags in stack._services()}
    assert "auto/2" in flags["text-pool-0"]
    assert "auto/2" in flags["text-pool-1"]
    assert flags["text-pool-0"] == flags["text-pool-1"]
