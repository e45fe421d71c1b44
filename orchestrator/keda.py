"""KEDA's ExternalScaler: the decision's replicas as a metric, for KEDA to scale by.

The trigger's metadata name the pool. The metric is the number of replicas the pool should have and
one replica stands for 1 of it, so the HPA that KEDA keeps arrives at that number; whether it is
above zero is what wakes the pool or lets it go. An HPA does nothing about a metric within a tenth
of its target, so a small step of a large pool is told as one that is large enough. While there is
no decision, calls are refused and streams are silent: KEDA then holds, or takes its fallback, where
a zero would take the pool away.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

from chiasm import errors
from chiasm.orchestrator.types import Decision, Pool
from chiasm.v1 import externalscaler_pb2, externalscaler_pb2_grpc

POOL_KEY = "pool"
"""Key of the trigger's metadata; its value is a `Pool`."""

LOOK_S = 0.25
"""How soon a change of the decision is pushed."""

TOLERANCE = 0.1
"""Of an HPA: what is nearer to its target it takes for equal (the controller manager's default)."""

RETRY_AFTER_S = 1.0


class KedaScaler(externalscaler_pb2_grpc.ExternalScalerServicer):
    """Answers from the latest decision, None while there is none yet."""

    def __init__(self, decision: Callable[[], Decision | None]) -> None:
        self._decision = decision
        self._closing = asyncio.Event()

    async def IsActive(
        self, request: externalscaler_pb2.ScaledObjectRef, context: Any
    ) -> externalscaler_pb2.IsActiveResponse:
        pool = _pool(request)
        return externalscaler_pb2.IsActiveResponse(result=self._decided(pool).replicas[pool] > 0)

    async def StreamIsActive(
        self, request: externalscaler_pb2.ScaledObjectRef, context: Any
    ) -> AsyncIterator[externalscaler_pb2.IsActiveResponse]:
        pool, told = _pool(request), None
        while not self._closing.is_set():
            decision = self._decision()
            if decision is not None and pool in decision.replicas:
                is_active = decision.replicas[pool] > 0
                if is_active != told:
                    told = is_active
                    yield externalscaler_pb2.IsActiveResponse(result=is_active)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._closing.wait()

    async def GetMetricSpec(
        self, request: externalscaler_pb2.ScaledObjectRef, context: Any
    ) -> externalscaler_pb2.GetMetricSpecResponse:
        return _spec(_pool(request))

    async def StreamMetricSpec(
        self, request: externalscaler_pb2.ScaledObjectRef, context: Any
    ) -> AsyncIterator[externalscaler_pb2.GetMetricSpecResponse]:
        yield _spec(_pool(request))
        await self._closing.wait()  # it never changes; a stream that ends would be opened again

    async def GetMetrics(
        self, request: externalscaler_pb2.GetMetricsRequest, context: Any
    ) -> externalscaler_pb2.GetMetricsResponse:
        pool = _pool(request.scaled_object_ref)
        if request.metric_name != _metric(pool):
            raise errors.InvalidArgument("metric_name", f"is not {_metric(pool)!r}")
        decision = self._decided(pool)
        replicas = heard(decision.replicas[pool], before=decision.before.get(pool, 0))
        value = externalscaler_pb2.MetricValue(
            metric_name=_metric(pool),
            metric_value=math.ceil(replicas),
            metric_value_float=replicas,
        )
        return externalscaler_pb2.GetMetricsResponse(metric_values=[value])

    def close(self) -> None:
        """Ends the streams."""
        self._closing.set()

    def _decided(self, pool: Pool) -> Decision:
        decision = self._decision()
        if decision is None or pool not in decision.replicas:
            raise errors.Unavailable(
                f"nothing is decided about {pool}",
                reason="NOTHING_DECIDED",
                retry_after_s=RETRY_AFTER_S,
            )
        return decision


def heard(replicas: int, *, before: int) -> int:
    """The nearest number of replicas to those decided that an HPA acts upon, having `before`.

    How far it goes at a time is for its `behavior`: with the chart's, down by one a minute.
    """
    if replicas > before:
        return max(replicas, math.floor(before * (1 + TOLERANCE)) + 1)
    if 0 < replicas < before:
        return max(1, min(replicas, math.ceil(before * (1 - TOLERANCE)) - 1))
    return replicas


def _pool(request: externalscaler_pb2.ScaledObjectRef) -> Pool:
    named = request.scaler_metadata.get(POOL_KEY, "")
    if named not in list(Pool):
        raise errors.InvalidArgument(
            f"scaler_metadata[{POOL_KEY}]", f"must be one of {', '.join(Pool)}, not {named!r}"
        )
    return Pool(named)


def _metric(pool: Pool) -> str:
    return f"chiasm-{pool}"


def _spec(pool: Pool) -> externalscaler_pb2.GetMetricSpecResponse:
    spec = externalscaler_pb2.MetricSpec(
        metric_name=_metric(pool), target_size=1, target_size_float=1.0
    )
    return externalscaler_pb2.GetMetricSpecResponse(metric_specs=[spec])
