"""The orchestrator process."""

from __future__ import annotations

import asyncio
import os
import sys
import time
import uuid

import structlog

from chiasm import errors
from chiasm.flags import settings_command
from chiasm.orchestrator.config import OrchestratorSettings
from chiasm.orchestrator.members import Membership
from chiasm.orchestrator.servicer import OrchestratorServicer
from chiasm.telemetry import logs, metrics, traces
from chiasm.transport.messages import CONTROL_BYTES
from chiasm.transport.server import Server, announce, bind_host
from chiasm.transport.service import flush
from chiasm.v1 import control_pb2, control_pb2_grpc

_SERVICE = control_pb2.DESCRIPTOR.services_by_name["Orchestrator"].full_name

log = structlog.get_logger()


async def _serve(settings: OrchestratorSettings, instance_id: str) -> None:
    membership = Membership(
        instance_id=instance_id,
        lease_s=settings.lease_s,
        max_members=settings.max_members,
        now=time.monotonic(),
    )
    servicer = OrchestratorServicer(
        membership,
        lease_s=settings.lease_s,
        max_members=settings.max_members,
        max_watchers=settings.max_watchers,
    )
    server = Server(services=[_SERVICE], max_message_bytes=CONTROL_BYTES)
    control_pb2_grpc.add_OrchestratorServicer_to_server(servicer, server.grpc)
    port = await server.start(settings.bind)
    host = bind_host(settings.bind)
    metrics_port = metrics.serve(host, settings.metrics_port, "orchestrator")
    announce(f"{settings.advertise_host}:{port}")
    log.info("listening", port=port, metrics_port=metrics_port, instance_id=instance_id)
    leases = asyncio.create_task(servicer.run_leases(), name="leases")
    await server.set_serving(True)
    # Its only calls are streams without an end, so there is nothing to wait for.
    await server.run_until_stopped(grace_s=0.5, on_drain=servicer.close)
    leases.cancel()


def run(settings: OrchestratorSettings) -> int:
    """Runs the orchestrator until SIGTERM or SIGINT; returns the exit code."""
    instance_id = uuid.uuid4().hex
    logs.configure("orchestrator", level=settings.log_level)
    provider = traces.configure("orchestrator", instance_id=instance_id)
    with asyncio.Runner() as runner:
        try:
            runner.run(_serve(settings, instance_id))
        except (errors.ChiasmError, OSError) as error:
            log.error("start_failed", error=str(error))
            return 1
        flush(provider)
        # The streams of members have been cut off; ending the loop under them would only add noise.
        sys.stderr.flush()
        os._exit(0)


main = settings_command(OrchestratorSettings, run, prog="chiasm orchestrator")

if __name__ == "__main__":
    main()
