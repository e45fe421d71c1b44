"""The life of a service process, the same for all of them.

Bind, announce, join as LOADING, load in the background, READY as soon as the weights and whatever
the service depends on are there; on SIGTERM drain, leave, stop. A service says what is particular
to it with a `Service`; `serve` does the rest. A program's `__main__` is then

    def run(settings: DecoderSettings) -> NoReturn:
        serve(settings, name="decoder", role=Role.DECODER, services=[...], build=...)

    main = settings_command(DecoderSettings, run, prog="chiasm decoder")  # chiasm.flags

    if __name__ == "__main__":
        main()
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import structlog
from opentelemetry.sdk.trace import TracerProvider

from chiasm import errors
from chiasm.config import ProcessSettings, ServiceSettings
from chiasm.load import Load
from chiasm.membership import MemberInfo, MemberState, Role, Topology
from chiasm.telemetry import logs, metrics, traces
from chiasm.transport.interceptors import Interceptor
from chiasm.transport.membership import Member, TopologyWatcher
from chiasm.transport.server import Server, address_of, announce, bind_host

FLUSH_TIMEOUT_S = 2.0
"""How long spans may take to reach a collector at exit."""

CLOSE_TIMEOUT_S = 5.0
"""How long a service may take to release what it holds."""

LIVENESS_PERIOD_S = 1.0
"""How often a service is asked whether it gets on."""

log = structlog.get_logger()


async def _nothing() -> None: ...


def _always(*_: Topology) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What one service brings to its process.

    register: adds the servicers to the grpc server; called before anything is loaded.
    load: fetches weights and the like, in the background; heavy work belongs in a thread. An
        exception ends the process with exit code 1.
    is_ready: whether what the service depends on is there; asked after every change of the topology
        and after `ServiceProcess.recheck`. It should hold back only for what no request can do
        without: while it is false the process is NOT_SERVING and a LOADING member.
    is_alive: whether it gets on with the work it has. While it does not, the process is neither
        live nor ready, and does not drain. It should be generous: a supervisor restarts what is not
        live.
    hand_over: has others take its place while it still takes work; called before `drain`, where the
        member is READY.
    drain: refuses new work and waits for the work in flight; cut off after `grace_s`.
    close: releases resources after the grpc server has stopped.
    moves_callers: whether connections are told to go elsewhere as soon as it drains; for what is
        reached by one address for several processes.
    watch_topology: whether `ServiceProcess.topology` follows the orchestrator.
    report_load: how busy it is, for every report to the orchestrator; None while it cannot tell.
    """

    register: Callable[[grpc.aio.Server], Any]
    load: Callable[[], Awaitable[None]] = _nothing
    is_ready: Callable[[Topology], bool] = _always
    is_alive: Callable[[], bool] = _always
    hand_over: Callable[[], Awaitable[None]] = _nothing
    drain: Callable[[], Awaitable[None]] = _nothing
    close: Callable[[], Awaitable[None]] = _nothing
    watch_topology: bool = False
    moves_callers: bool = False
    report_load: Callable[[], Load | None] = lambda: None


class ServiceProcess:
    """What a process offers its service: `member` to report with, `topology` to look things up."""

    def __init__(self, member: Member, topology: TopologyWatcher, server: Server) -> None:
        self.member = member
        self.topology = topology
        self.server = server
        self._is_loaded = False
        self._failure: Exception | None = None
        self._recheck = asyncio.Event()
        topology.subscribe(lambda _: self.recheck())

    def recheck(self) -> None:
        """Has `Service.is_ready` asked again; call when something it depends on has changed."""
        self._recheck.set()

    async def live(self, service: Service, *, grace_s: float) -> int:
        """Loads and serves until SIGTERM, or until loading fails; returns the exit code."""
        self.member.start()
        if service.watch_topology:
            self.topology.start()
        tasks = [
            asyncio.create_task(self._become_ready(service), name="readiness"),
            asyncio.create_task(self._stay_alive(service), name="liveness"),
        ]
        await self.server.run_until_stopped(
            grace_s=grace_s,
            on_drain=lambda: self._drain(service),
            moves_callers=service.moves_callers,
        )
        for task in tasks:
            task.cancel()
        await self.member.close()
        await self.topology.close()
        try:
            await asyncio.wait_for(service.close(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            log.warning("close_incomplete")
        return 0 if self._failure is None else 1

    async def _become_ready(self, service: Service) -> None:
        """Loads, then publishes readiness whenever it changes."""
        try:
            await service.load()
            self._is_loaded = True
            await self.server.set_loaded()
            log.info("loaded")
            while not self.server.stopping.is_set():
                self._recheck.clear()
                ready = self.server.live and service.is_ready(self.topology.current)
                if ready != self.server.serving:
                    log.info("ready" if ready else "not_ready")
                    self.member.update(state=MemberState.READY if ready else MemberState.LOADING)
                    await self.server.set_serving(ready)
                await self._recheck.wait()
        except Exception as error:
            _log_failure("failed" if self._is_loaded else "load_failed", error)
            self._failure = error
            self.server.stopping.set()

    async def _stay_alive(self, service: Service) -> None:
        """Publishes whether the service gets on, whenever that changes."""
        while True:
            alive = service.is_alive()
            if alive != self.server.live:
                if alive:
                    log.info("going_on")
                else:
                    log.error("stalled")
                await self.server.set_live(alive)
                self.recheck()
            await asyncio.sleep(LIVENESS_PERIOD_S)

    async def _drain(self, service: Service) -> None:
        if not self.server.live:  # what it would wait for does not get on
            await self.member.leave()
            return
        if self.member.report.is_ready:
            await service.hand_over()
        self.member.update(state=MemberState.DRAINING)
        if self._is_loaded:
            await service.drain()
        await self.member.leave()


async def _run(
    settings: ServiceSettings,
    *,
    name: str,
    role: Role,
    services: Sequence[str],
    max_message_bytes: int,
    max_request_bytes: int | None,
    build: Callable[[ServiceProcess], Service],
    interceptors: Sequence[Interceptor],
) -> int:
    logs.configure(name, level=settings.log_level)
    member_id = f"{settings.member_name or name}-{uuid.uuid4().hex[:12]}"
    provider = traces.configure(name, instance_id=member_id)
    try:
        server = Server(
            services=services,
            max_message_bytes=max_message_bytes,
            max_request_bytes=max_request_bytes,
            interceptors=interceptors,
        )
        member = Member(
            settings.orchestrator, MemberInfo(member_id=member_id, role=role, address="")
        )
        process = ServiceProcess(member, TopologyWatcher(settings.orchestrator), server)
        service = build(process)
        member.load = service.report_load
        service.register(server.grpc)
        port = await server.start(settings.bind, health_port=settings.health_port)
        metrics_port = serve_metrics(settings, role)
        address = address_of(settings.advertise_host, port)
        metrics_address = address_of(settings.advertise_host, metrics_port)
        member.update(address=address, metrics_address=metrics_address)
    except Exception as error:
        _log_failure("start_failed", error)
        return 1
    announce(address)
    log.info("listening", address=address, metrics_port=metrics_port, member_id=member_id)
    code = await process.live(service, grace_s=settings.grace_s)
    flush(provider)
    return code


def serve(
    settings: ServiceSettings,
    *,
    name: str,
    role: Role,
    services: Sequence[str],
    max_message_bytes: int,
    build: Callable[[ServiceProcess], Service],
    max_request_bytes: int | None = None,
    interceptors: Sequence[Interceptor] = (),
) -> NoReturn:
    """Runs a service until SIGTERM or SIGINT, then ends the process.

    `name` stands in logs, traces and the member id; `services` are the full names of the grpc
    services for health and reflection; messages and requests are bounded as in `Server`; `build`
    makes the service, quickly and without loading; `interceptors` come before its handlers.
    Exit code: 0, or 1 when it could not start or load.
    """
    with asyncio.Runner() as runner:
        code = runner.run(
            _run(
                settings,
                name=name,
                role=role,
                services=services,
                max_message_bytes=max_message_bytes,
                max_request_bytes=max_request_bytes,
                build=build,
                interceptors=interceptors,
            )
        )
        # Everything is closed by now. What an orderly end of the interpreter would add is a wait
        # for threads that may still load weights, and a second for torch to take itself apart.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve_metrics(settings: ProcessSettings, service: str) -> int:
    """Starts a process's /metrics where its settings say; returns the port."""
    host = settings.metrics_host or bind_host(settings.bind)
    return metrics.serve(host, settings.metrics_port, service)


def flush(provider: TracerProvider | None) -> None:
    """Sends the last spans, for as long as FLUSH_TIMEOUT_S allows."""
    if provider is not None:
        thread = threading.Thread(target=provider.shutdown, daemon=True)
        thread.start()
        thread.join(FLUSH_TIMEOUT_S)


def _log_failure(event: str, error: BaseException | None) -> None:
    """One line; a traceback only for what is not a plain error of set-up."""
    expected = isinstance(error, errors.ChiasmError | OSError | ValueError)
    log.error(event, error=str(error), exc_info=None if expected else error)
