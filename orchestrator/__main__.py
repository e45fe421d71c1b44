"""The orchestrator process."""

from __future__ import annotations

import asyncio
import os
import sys
import time
import uuid
from dataclasses import dataclass

import structlog

from chiasm import errors
from chiasm.flags import settings_command
from chiasm.orchestrator.config import OrchestratorSettings
from chiasm.orchestrator.keda import KedaScaler
from chiasm.orchestrator.leadership import Leadership
from chiasm.orchestrator.members import Membership
from chiasm.orchestrator.relay import Relay
from chiasm.orchestrator.scaling import Scaling
from chiasm.orchestrator.servicer import OrchestratorServicer
from chiasm.orchestrator.types import Backend
from chiasm.telemetry import logs, traces
from chiasm.transport.membership import REPORTS_PER_LEASE
from chiasm.transport.messages import CONTROL_BYTES
from chiasm.transport.server import Server, address_of, announce
from chiasm.transport.service import flush, serve_metrics
from chiasm.v1 import control_pb2, control_pb2_grpc, externalscaler_pb2, externalscaler_pb2_grpc

_SERVICE = control_pb2.DESCRIPTOR.services_by_name["Orchestrator"].full_name
_KEDA_SERVICE = externalscaler_pb2.DESCRIPTOR.services_by_name["ExternalScaler"].full_name

STREAMS_TIMEOUT_S = 0.2
"""How long streams may take to end; those of members have no end."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What one process is made of."""

    leadership: Leadership
    relay: Relay
    scaling: Scaling
    servicer: OrchestratorServicer
    keda: KedaScaler
    server: Server

    @classmethod
    def build(cls, settings: OrchestratorSettings, instance_id: str) -> _Parts:
        """Everything, with nothing started yet."""
        leadership = Leadership(settings, instance_id=instance_id)
        relay = Relay(leads=leadership.leads, leader=leadership.leader)
        membership = Membership(
            instance_id=instance_id,
            lease_s=settings.lease_s,
            max_members=settings.max_members,
            now=time.monotonic(),
        )
        scaling = _scaling(settings, membership, leadership)
        servicer = OrchestratorServicer(
            membership,
            lease_s=settings.lease_s,
            max_members=settings.max_members,
            max_watchers=settings.max_watchers,
            launcher=scaling.launcher,
        )
        keda = KedaScaler(lambda: scaling.loop.decision)
        server = Server(
            services=[_SERVICE, _KEDA_SERVICE],
            max_message_bytes=CONTROL_BYTES,
            interceptors=[relay],
        )
        control_pb2_grpc.add_OrchestratorServicer_to_server(servicer, server.grpc)
        externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server(keda, server.grpc)
        return cls(
            leadership=leadership,
            relay=relay,
            scaling=scaling,
            servicer=servicer,
            keda=keda,
            server=server,
        )

    async def lead(self) -> None:
        """What only the leader does; waits until this process is."""
        await self.leadership.elected()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.servicer.run_leases())
            tasks.create_task(self.scaling.loop.run(self.servicer.changed))

    async def close(self) -> None:
        """Hands over, and ends the streams. Nothing may be done as a leader any more."""
        await self.leadership.resign()
        self.keda.close()
        await self.scaling.loop.close()
        await self.servicer.close()
        await self.relay.close()
        await self.server.grpc.stop(STREAMS_TIMEOUT_S)


async def _serve(settings: OrchestratorSettings, instance_id: str) -> int:
    """Serves until SIGTERM, SIGINT, or the loss of the lease; returns the exit code."""
    parts = _Parts.build(settings, instance_id)
    port = await parts.server.start(settings.bind, health_port=settings.health_port)
    metrics_port = serve_metrics(settings, "orchestrator")
    address = address_of(settings.advertise_host, port)
    announce(address)
    log.info("listening", port=port, metrics_port=metrics_port, instance_id=instance_id)

    campaign = asyncio.create_task(parts.leadership.campaign(address), name="campaign")
    leading = asyncio.create_task(parts.lead(), name="lead")
    ended: list[asyncio.Task[None]] = []
    for task in (campaign, leading):
        task.add_done_callback(lambda _: parts.server.stopping.set())

    async def close() -> None:
        ended.extend(task for task in (campaign, leading) if task.done())
        leading.cancel()
        await asyncio.wait({leading})
        await parts.close()

    await parts.server.set_serving(True)
    await parts.server.run_until_stopped(grace_s=settings.grace_s, on_drain=close)
    for task in ended:
        task.result()  # raises what ended it, if it was not the loss of the lease
    campaign.cancel()
    return 1 if ended else 0


def _scaling(
    settings: OrchestratorSettings, membership: Membership, leadership: Leadership
) -> Scaling:
    return Scaling(
        settings,
        membership,
        report_s=settings.lease_s / REPORTS_PER_LEASE,
        may_act=leadership.leads,
        kubernetes=lambda: _stateful_sets(settings, leadership),
    )


def _stateful_sets(settings: OrchestratorSettings, leadership: Leadership) -> Backend:
    try:
        from chiasm.orchestrator.kubernetes import StatefulSets, connect
    except ImportError:
        raise errors.FailedPrecondition(
            "--backend kubernetes needs the Kubernetes client: pip install chiasm[kubernetes]"
        ) from None
    return StatefulSets(
        connect(),
        namespace=settings.namespace,
        prefix=settings.workload_prefix,
        may_act=leadership.leads,
    )


def run(settings: OrchestratorSettings) -> int:
    """Runs the orchestrator until SIGTERM or SIGINT; returns the exit code."""
    instance_id = uuid.uuid4().hex
    logs.configure("orchestrator", level=settings.log_level)
    provider = traces.configure("orchestrator", instance_id=instance_id)
    with asyncio.Runner() as runner:
        try:
            code = runner.run(_serve(settings, instance_id))
        except (errors.ChiasmError, OSError) as error:
            log.error("start_failed", error=str(error))
            return 1
        flush(provider)
        # The streams of members have been cut off; ending the loop under them would only add noise.
        sys.stderr.flush()
        os._exit(code)


main = settings_command(OrchestratorSettings, run, prog="chiasm orchestrator")

if __name__ == "__main__":
    main()
