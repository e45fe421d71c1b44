"""KEDA's questions, asked over the wire by a client of its own contract."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from control.keda_client import KedaClient

from chiasm import errors
from chiasm.orchestrator.keda import KedaScaler, heard
from chiasm.orchestrator.types import Decision, Pool
from chiasm.transport import status
from chiasm.transport.messages import CONTROL_BYTES
from chiasm.transport.server import Server
from chiasm.v1 import externalscaler_pb2_grpc

WAIT_S = 20.0


class Scaler:
    """A served scaler and the decision it answers from."""

    def __init__(self) -> None:
        self.address = ""
        self.decision: Decision | None = None
        self.servicer = KedaScaler(lambda: self.decision)

    def decide(self, **replicas: int) -> None:
        pools = {Pool(name.replace("_", "-")): count for name, count in replicas.items()}
        self.decision = Decision(at=0.0, replicas=pools)


@pytest.fixture
async def scaler() -> AsyncIterator[Scaler]:
    served = Scaler()
    server = Server(services=["externalscaler.ExternalScaler"], max_message_bytes=CONTROL_BYTES)
    externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server(served.servicer, server.grpc)
    served.address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    yield served
    served.servicer.close()
    await server.grpc.stop(1)


async def ask(scaler: Scaler, question: Any, pool: str = "vision-experts", **more: str) -> Any:
    """A question of KedaClient, beside the event loop that answers it."""

    def call() -> Any:
        with KedaClient(scaler.address, **({"pool": pool} if pool else {}), **more) as keda:
            return question(keda)

    return await asyncio.wait_for(asyncio.to_thread(call), WAIT_S)


async def refusal(scaler: Scaler, question: Any, pool: str = "vision-experts") -> Any:
    with pytest.raises(grpc.RpcError) as refused:
        await ask(scaler, question, pool)
    return status.from_rpc_error(refused.value)


@pytest.mark.parametrize("pool", list(Pool))
async def test_every_pool_has_one_metric_of_which_a_replica_is_one(
    scaler: Scaler, pool: Pool
) -> None:
    name = f"chiasm-{pool}"
    assert await ask(scaler, KedaClient.specs, pool) == [(name, 1, 1.0)]
    assert await ask(scaler, KedaClient.first_streamed_specs, pool) == [(name, 1, 1.0)]
    scaler.decision = Decision(at=0.0, replicas={pool: 3})
    assert await ask(scaler, lambda keda: keda.metrics(name), pool) == [(name, 3, 3.0)]


async def test_the_metric_and_the_activity_follow_the_decision(scaler: Scaler) -> None:
    for replicas in (2, 5, 1, 0, 1):
        scaler.decide(vision_experts=replicas, text_experts=9)
        assert await ask(scaler, KedaClient.wanted_replicas) == replicas
        assert await ask(scaler, KedaClient.is_active) == (replicas > 0)


@pytest.mark.parametrize("before", [1, 2, 9, 10, 11, 12, 20, 33, 64])
def test_an_hpa_hears_of_every_step_of_a_pool_of_any_size(before: int) -> None:
    """Its rule: nothing within a tenth, else up to the metric."""

    def scaled(metric: int) -> int:
        return before if abs(metric / before - 1) <= 0.1 else metric

    assert heard(before, before=before) == before
    assert heard(0, before=before) == 0
    for wanted in range(1, 2 * before):
        found = scaled(heard(wanted, before=before))
        if wanted > before:
            assert wanted <= found <= max(wanted, before * 1.1 + 1)
        elif wanted < before:
            assert min(wanted, before * 0.9 - 1) <= found <= wanted
            assert found >= 1


async def test_a_small_step_of_a_large_pool_is_told_as_a_larger_one(scaler: Scaler) -> None:
    scaler.decision = Decision(
        at=0.0, before={Pool.TEXT_EXPERTS: 12}, replicas={Pool.TEXT_EXPERTS: 11}
    )
    assert await ask(scaler, KedaClient.wanted_replicas, Pool.TEXT_EXPERTS) == 10


async def test_a_pool_that_wakes_or_goes_is_pushed(scaler: Scaler) -> None:
    scaler.decide(vision_experts=0)
    with KedaClient(scaler.address, pool="vision-experts") as keda:
        pushed = keda.activity()

        async def next_one() -> bool:
            return await asyncio.wait_for(asyncio.to_thread(next, pushed), WAIT_S)

        assert await next_one() is False
        for replicas, is_active in ((1, True), (0, False), (4, True)):
            scaler.decide(vision_experts=replicas)
            assert await next_one() is is_active


async def test_nothing_is_said_while_nothing_is_decided(scaler: Scaler) -> None:
    """A zero would take the pool away; an error makes KEDA hold."""
    for decision in (None, Decision(at=0.0, replicas={Pool.DECODER: 2})):
        scaler.decision = decision
        for question in (KedaClient.is_active, KedaClient.wanted_replicas):
            refused = await refusal(scaler, question)
            assert isinstance(refused, errors.Unavailable)
            assert refused.reason == "NOTHING_DECIDED"
    with KedaClient(scaler.address, pool="vision-experts") as keda:
        pushed = asyncio.create_task(asyncio.to_thread(next, keda.activity()))
        await asyncio.sleep(0.6)
        assert not pushed.done()
        scaler.decide(vision_experts=2)
        assert await asyncio.wait_for(pushed, WAIT_S) is True


@pytest.mark.parametrize("pool", ["", "gateway", "VISION-EXPERTS"])
async def test_a_trigger_without_a_known_pool_is_told_so(scaler: Scaler, pool: str) -> None:
    scaler.decide(vision_experts=1)
    for question in (KedaClient.is_active, KedaClient.specs, lambda keda: next(keda.activity())):
        refused = await refusal(scaler, question, pool)
        assert isinstance(refused, errors.InvalidArgument)
        assert refused.field == "scaler_metadata[pool]"
        assert "vision-experts" in refused.message


async def test_an_unknown_metric_is_told_so(scaler: Scaler) -> None:
    scaler.decide(vision_experts=1)
    refused = await refusal(scaler, lambda keda: keda.metrics("chiasm-decoder"))
    assert isinstance(refused, errors.InvalidArgument)
    assert refused.field == "metric_name"
