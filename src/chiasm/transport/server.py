"""The only server bootstrap: health, reflection, interceptor, SIGTERM -> drain -> stop."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined] # public there
from grpc_reflection.v1alpha import reflection

from chiasm import errors
from chiasm.transport import channel
from chiasm.transport.interceptors import CallInterceptor

log = structlog.get_logger()


class Server:
    """One grpc.aio server of one process.

    `services` are full names for reflection and health. Health starts NOT_SERVING and follows
    `set_serving`; the empty service name follows it too.
    """

    def __init__(self, *, services: Sequence[str], max_message_bytes: int) -> None:
        self._services = ("", *services)
        self.grpc = grpc.aio.server(
            interceptors=[CallInterceptor()],
            options=[*channel.options(max_message_bytes), ("grpc.so_reuseport", 0)],
        )
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        names = (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self.grpc)
        self.stopping = asyncio.Event()
        self.serving = False

    async def start(self, bind: str) -> int:
        """Binds host:port (port 0: any free one) and starts; returns the port.

        Raises InvalidArgument when the address cannot be bound.
        """
        await self.set_serving(False)
        try:
            port = self.grpc.add_insecure_port(bind)
        except RuntimeError:
            port = 0
        if not port:
            raise errors.InvalidArgument("bind", f"cannot listen on {bind!r}")
        await self.grpc.start()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stopping.set)
        return int(port)

    async def set_serving(self, serving: bool) -> None:
        """Publishes readiness."""
        self.serving = serving
        state = health_pb2.HealthCheckResponse.ServingStatus.Value(
            "SERVING" if serving else "NOT_SERVING"
        )
        for name in self._services:
            await self._health.set(name, state)

    async def run_until_stopped(
        self, *, grace_s: float, on_drain: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Waits for SIGTERM or SIGINT; then NOT_SERVING, drain and stop, all within `grace_s`."""
        await self.stopping.wait()
        log.info("draining", grace_s=grace_s)
        end = time.monotonic() + grace_s
        await self._health.enter_graceful_shutdown()
        if on_drain is not None:
            try:
                await asyncio.wait_for(on_drain(), grace_s)
            except TimeoutError:
                log.warning("drain_incomplete")
        await self.grpc.stop(max(0.0, end - time.monotonic()))
        log.info("stopped")


def bind_host(bind: str) -> str:
    """The host of host:port, an IPv6 one without its brackets."""
    return bind.rpartition(":")[0].strip("[]")


def announce(address: str) -> None:
    """Tells a launcher on stdout where the process listens."""
    sys.stdout.write(f"listening {address}\n")
    sys.stdout.flush()
