"""The launcher as the backend of the orchestrator."""

from __future__ import annotations

import pytest
from control.scaling_world import NUM_SHARDS, TEXT, server_info

from chiasm import errors
from chiasm.orchestrator.launcher import Launcher
from chiasm.orchestrator.types import Pool
from chiasm.v1 import control_pb2


def report(**counts: int) -> control_pb2.ScaleReport:
    return control_pb2.ScaleReport(
        pools=[
            control_pb2.PoolReplicas(pool=f"POOL_{name.upper()}", replicas=count)
            for name, count in counts.items()
        ]
    )


def replicas(order: control_pb2.ScaleOrder) -> dict[str, int]:
    return {control_pb2.Pool.Name(entry.pool): entry.replicas for entry in order.pools}


async def test_a_launcher_gets_orders_and_knows_who_goes_first() -> None:
    launcher = Launcher()
    with pytest.raises(errors.Unavailable):
        await launcher.replicas()
    orders = launcher.orders(report(text_experts=2, encoder=1))
    assert replicas(await anext(orders)) == {"POOL_ENCODER": 1, "POOL_TEXT_EXPERTS": 2}
    assert await launcher.replicas() == {TEXT: 2, Pool.ENCODER: 1}
    going = server_info(TEXT, "b", NUM_SHARDS, (0,))
    assert await launcher.retire(TEXT, [going, server_info(TEXT, "a", NUM_SHARDS, (1,))]) is going
    assert await launcher.retire(TEXT, [going]) is None, "the other one never came"
    assert await launcher.retire(TEXT, [going, server_info(TEXT, "a", NUM_SHARDS, (1,))]) is going
    await launcher.scale(TEXT, 1)
    order = await anext(orders)
    assert replicas(order)["POOL_TEXT_EXPERTS"] == 1
    assert order.retired_addresses == ["b"]
    with pytest.raises(errors.NotFound):
        await launcher.scale(Pool.DECODER, 2)
    await orders.aclose()
    with pytest.raises(errors.Unavailable):
        await launcher.replicas()


async def test_a_newer_launcher_takes_over() -> None:
    launcher = Launcher()
    old = launcher.orders(report(text_experts=2))
    await anext(old)
    new = launcher.orders(report(text_experts=3))
    await anext(new)
    with pytest.raises(StopAsyncIteration):
        await anext(old)
    assert await launcher.replicas() == {TEXT: 3}
    launcher.end()
    with pytest.raises(StopAsyncIteration):
        await anext(new)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (control_pb2.PoolReplicas(pool=99, replicas=1), "pools[0].pool"),  # type: ignore[arg-type]
        (
            control_pb2.PoolReplicas(pool="POOL_DECODER", replicas=10_000),
            "pools[0].replicas",
        ),
    ],
)
async def test_a_report_that_cannot_be_is_refused(
    bad: control_pb2.PoolReplicas, field: str
) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        await anext(Launcher().orders(control_pb2.ScaleReport(pools=[bad])))
    assert refused.value.field == field
