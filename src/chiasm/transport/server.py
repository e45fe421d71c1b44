"""The only server bootstrap: health, reflection, interceptor, SIGTERM -> drain -> stop."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined] # public there
from grpc_reflection.v1alpha import reflection

from chiasm import errors
from chiasm.transport import channel, tls
from chiasm.transport.interceptors import CallInterceptor, Interceptor
from chiasm.types import TlsFiles

LIVE = "chiasm.live"
"""Health's name for: the process gets on. NOT_SERVING asks for a restart."""

LOADED = "chiasm.loaded"
"""Health's name for: everything is loaded, whether or not what the service depends on is there."""

LAST_CALLS_S = 5.0
"""How long calls may last past the drain: what does work is over, and a call that came in at the
very moment of the stop may have been lost inside grpc, where it would last to its deadline."""

log = structlog.get_logger()


class _Health(health_aio.HealthServicer):  # type: ignore[misc] # untyped there
    """Health whose watches end with the process, which would wait for them as for any call."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = asyncio.Event()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        watch = asyncio.ensure_future(super().Watch(request, context))
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait((watch, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            ended.cancel()

    def end(self) -> None:
        """Ends all watches."""
        self._ended.set()


class Server:
    """One grpc.aio server of one process.

    `services` are full names for reflection and health. Health starts NOT_SERVING and follows
    `set_serving`; the empty service name follows it too, LIVE and LOADED do not. A message has at
    most `max_message_bytes`, a request at most `max_request_bytes` where that is given.
    `interceptors` come between a handler and the one that every server has. The port uses the TLS
    of the process.
    """

    def __init__(
        self,
        *,
        services: Sequence[str],
        max_message_bytes: int,
        max_request_bytes: int | None = None,
        interceptors: Sequence[Interceptor] = (),
    ) -> None:
        self._services = ("", *services)
        self.grpc = grpc.aio.server(
            interceptors=[CallInterceptor(), *interceptors],
            options=[
                *channel.options(max_message_bytes, max_received_bytes=max_request_bytes),
                ("grpc.so_reuseport", 0),
            ],
        )
        self._probes: grpc.aio.Server | None = None
        self._health = _Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        names = (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self.grpc)
        self.stopping = asyncio.Event()
        self.serving = False
        self.live = True

    async def start(self, bind: str, *, health_port: int | None = None) -> int:
        """Binds host:port (port 0: any free one) and starts; returns the port.

        health_port: where health alone is served in plain text, on the same host; None: nowhere.
        Raises InvalidArgument when an address cannot be bound.
        """
        await self.set_serving(False)
        await self._set_health(LOADED, False)
        await self.set_live(True)
        port = _listen(self.grpc, bind, tls.of_port(), name="bind")
        await self.grpc.start()
        if health_port is not None:
            self._probes = grpc.aio.server()
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probes)
            host = bind.rpartition(":")[0]
            found = _listen(self._probes, f"{host}:{health_port}", None, name="health-port")
            await self._probes.start()
            log.info("probes", port=found)
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stopping.set)
        return port

    async def set_serving(self, serving: bool) -> None:
        """Publishes readiness. Who serves has loaded; who is stopping does not serve any more."""
        self.serving = serving and not self.stopping.is_set()
        if self.serving:
            await self.set_loaded()
        for name in self._services:
            await self._set_health(name, self.serving)

    async def set_loaded(self) -> None:
        """Publishes that everything is loaded."""
        await self._set_health(LOADED, True)

    async def set_live(self, live: bool) -> None:
        """Publishes whether the process gets on with its work."""
        self.live = live
        await self._set_health(LIVE, live)

    async def _set_health(self, name: str, serving: bool) -> None:
        state = "SERVING" if serving else "NOT_SERVING"
        await self._health.set(name, health_pb2.HealthCheckResponse.ServingStatus.Value(state))

    async def run_until_stopped(
        self,
        *,
        grace_s: float,
        on_drain: Callable[[], Awaitable[None]] | None = None,
        moves_callers: bool = False,
    ) -> None:
        """Waits for SIGTERM or SIGINT; then NOT_SERVING, drain and stop, all within `grace_s`; at
        once where the process does not get on: its callers go elsewhere when their calls break.

        moves_callers: connections are told to go elsewhere (GOAWAY) before the drain, while the
        calls in hand go on.
        """
        await self.stopping.wait()
        log.info("draining", grace_s=grace_s)
        end = time.monotonic() + grace_s
        await self.set_serving(False)
        stop = asyncio.create_task(self.grpc.stop(grace_s)) if moves_callers and self.live else None
        if on_drain is not None:
            try:
                await asyncio.wait_for(on_drain(), grace_s)
            except TimeoutError:
                log.warning("drain_incomplete")
        self._health.end()
        left_s = max(0.0, end - time.monotonic()) if self.live else 0.0
        await self.grpc.stop(min(left_s, LAST_CALLS_S))
        if stop is not None:
            await stop
        if self._probes is not None:
            await self._probes.stop(0)
        log.info("stopped")


def _listen(server: grpc.aio.Server, bind: str, files: TlsFiles | None, *, name: str) -> int:
    """Binds host:port; `name` is the setting to blame."""
    try:
        if files is None:
            port = server.add_insecure_port(bind)
        else:
            port = server.add_secure_port(bind, tls.server_credentials(files))
    except RuntimeError:
        port = 0
    if not port:
        raise errors.InvalidArgument(name, f"cannot listen on {bind!r}")
    return int(port)


def address_of(host: str, port: int) -> str:
    """host:port; an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def bind_host(bind: str) -> str:
    """The host of host:port, an IPv6 one without its brackets."""
    return bind.rpartition(":")[0].strip("[]")


def announce(address: str) -> None:
    """Tells a launcher on stdout where the process listens."""
    sys.stdout.write(f"listening {address}\n")
    sys.stdout.flush()
