"""The whole system on one machine, as real processes: what `chiasm up` runs."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import grpc
import structlog

from chiasm import cores, errors
from chiasm.child import Child
from chiasm.membership import Topology
from chiasm.replicas import Orders, Replicas
from chiasm.transport.channel import options
from chiasm.transport.messages import CONTROL_BYTES
from chiasm.transport.topology import topology_from_proto
from chiasm.types import AUTO_SHARDS, Modality, ShardSpec
from chiasm.v1 import control_pb2, control_pb2_grpc

LOOPBACK = "127.0.0.1"
POLL_S = 0.05
CALL_TIMEOUT_S = 2.0
TAIL_LINES = 10

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class StackConfig:
    """What to start. Raises InvalidArgument that names the field which cannot be.

    host: where the gateway listens; the other services stay on the loopback.
    port, orchestrator_port: 0 takes a free one.
    text_shards, text_servers, and the same for vision: the cut of each pool and over how many
        servers its shards are spread, in contiguous runs as even as possible.
    colocate: the decoder runs both pools inside; there are no expert servers then.
    video_advance: rule of positions after a video; None leaves it to the checkpoint.
    autoscale: the orchestrator starts and stops replicas, up to `max_replicas` of each pool, and
        places the shards; the numbers of servers are those to begin with.
    orchestrator_flags: more flags of the orchestrator.
    log_dir: where each process's output goes; None: a temporary folder, removed after a stop
        without incident.
    """

    model: Path
    host: str = LOOPBACK
    port: int = 0
    orchestrator_port: int = 0
    text_shards: int = 2
    text_servers: int = 1
    vision_shards: int = 2
    vision_servers: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    colocate: bool = False
    video_advance: Literal["original", "transformers"] | None = None
    autoscale: bool = False
    max_replicas: int = 2
    orchestrator_flags: tuple[str, ...] = ()
    log_dir: Path | None = None
    log_level: str = "info"
    startup_timeout_s: float = 300.0
    grace_s: float = 10.0

    def __post_init__(self) -> None:
        if not (self.model / "config.json").is_file():
            raise errors.InvalidArgument("model", f"no config.json in {str(self.model)!r}")
        for field in ("port", "orchestrator_port"):
            if not 0 <= getattr(self, field) <= 65535:
                raise errors.InvalidArgument(field, "must lie in 0..65535")
        for modality in Modality:
            shards, servers = self.num_shards(modality), self.num_servers(modality)
            if shards < 1:
                raise errors.InvalidArgument(f"{modality}_shards", "must be at least 1")
            if not 1 <= servers <= shards:
                raise errors.InvalidArgument(
                    f"{modality}_servers", f"must lie in 1..{shards}, the number of shards"
                )
            if self.autoscale and servers > self.max_replicas:
                raise errors.InvalidArgument("max_replicas", f"is below the {modality} servers")
        if self.autoscale and self.colocate:
            raise errors.InvalidArgument("autoscale", "cannot scale pools inside the decoder")

    def num_shards(self, modality: Modality) -> int:
        """Shards of a pool."""
        return self.text_shards if modality is Modality.TEXT else self.vision_shards

    def num_servers(self, modality: Modality) -> int:
        """Expert servers of a pool."""
        return self.text_servers if modality is Modality.TEXT else self.vision_servers


class Interrupted(Exception):
    """`LocalStack.interrupt` was called during the start."""


_POOLS = {
    "text-pool": control_pb2.POOL_TEXT_EXPERTS,
    "vision-pool": control_pb2.POOL_VISION_EXPERTS,
    "vision-encoder": control_pb2.POOL_ENCODER,
    "decoder": control_pb2.POOL_DECODER,
}
"""Names of the processes that are scaled, without their numbers."""

_NOT_FOR_CHILDREN = frozenset(
    f"CHIASM_{name}"
    for name in ("TLS_CERT", "TLS_KEY", "TLS_CA", "TLS_NAME", "METRICS_PORT", "HEALTH_PORT")
)

_STAGES = ("orchestrator", *_POOLS, "gateway")
"""All processes, those that others lean on first."""


class LocalStack:
    """All processes of one system.

    `start` returns the gateway's address when every part is ready; `stop` ends all of them. As a
    context manager it does both. Children end by themselves should this process be killed.
    """

    def __init__(self, config: StackConfig) -> None:
        self.config = config
        self.children: dict[str, Child] = {}
        self.log_dir = Path()
        self.orchestrator = ""
        self._interrupted = threading.Event()
        self._dead: set[str] = set()
        self._orders: Orders | None = None
        self._replicas = Replicas(
            self.children, pool_of=_pool_of, spawn=self._add_replica, grace_s=config.grace_s
        )

    def start(self, on_progress: Callable[[Topology], None] | None = None) -> str:
        """Starts everything and waits until every kind of request can be served.

        Raises Unavailable, with the last lines of the log at fault, when a process dies or the time
        is up, and Interrupted; nothing is left running then.
        """
        given = self.config.log_dir
        if given is not None:
            given.mkdir(parents=True, exist_ok=True)
        self.log_dir = given or Path(tempfile.mkdtemp(prefix="chiasm-"))
        end = time.monotonic() + self.config.startup_timeout_s
        try:
            self._spawn(
                "orchestrator",
                "chiasm.orchestrator",
                self.config.orchestrator_port,
                *self._orchestrator_flags(),
            )
            self.orchestrator = self._await_address("orchestrator", end)
            for name, module, flags in self._services():
                port = self.config.port if name == "gateway" else 0
                self._spawn(name, module, port, "--orchestrator", self.orchestrator, *flags)
            if self.config.autoscale:
                self._orders = Orders(self.orchestrator, self._replicas.counts())
            address = self._await_address("gateway", end)
            self._await_complete(end, on_progress)
        except BaseException:
            self.stop()
            raise
        return address

    def interrupt(self) -> None:
        """Makes a running `start` give up. May be called from a signal handler."""
        self._interrupted.set()

    def topology(self) -> Topology:
        """The topology as the orchestrator knows it; empty while it does not answer."""
        request = control_pb2.WatchTopologyRequest()
        with grpc.insecure_channel(self.orchestrator, options=options(CONTROL_BYTES)) as channel:
            call = control_pb2_grpc.OrchestratorStub(channel).WatchTopology(
                request, timeout=CALL_TIMEOUT_S
            )
            try:
                return topology_from_proto(next(call))
            except (grpc.RpcError, StopIteration):
                return Topology()
            finally:
                call.cancel()

    def reconcile(self) -> None:
        """Starts and stops replicas as the orchestrator has ordered; returns at once."""
        if self._orders is not None and (order := self._orders.current) is not None:
            self._replicas.step(order)

    def newly_dead(self) -> list[Child]:
        """Children that have died since the last time this was asked."""
        dead = [
            child
            for name, child in self.children.items()
            if child.exit_code is not None and not self._replicas.is_ending(name)
        ]
        dead += self._replicas.replaced
        self._replicas.replaced.clear()
        news = [child for child in dead if child.name not in self._dead]
        self._dead.update(child.name for child in news)
        return news

    def stop(self) -> None:
        """Ends all processes: those that take requests first, those they lean on after them.

        Each stage drains before the next is told; together they have `grace_s`. A stage is told at
        once, so that no expert server hands its shards to one that goes too.
        """
        if self._orders is not None:
            self._orders.close()
        end = time.monotonic() + self.config.grace_s
        is_clean = not self._dead and bool(self.children)
        children = sorted(self.children.values(), key=_stage_of, reverse=True)
        for _, stage in itertools.groupby(children, _stage_of):
            together = list(stage)
            for child in together:
                child.signal(signal.SIGTERM)
            for child in together:
                if not child.end(max(0.1, end - time.monotonic())):
                    log.warning("killed", process=child.name, after_s=self.config.grace_s)
                    is_clean = False
        self.children.clear()
        if is_clean and self.config.log_dir is None:
            shutil.rmtree(self.log_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _services(self) -> Iterator[tuple[str, str, list[str]]]:
        """Name, module and own flags of each service, those that others lean on first."""
        config = self.config
        model = ["--model", str(config.model), "--dtype", config.dtype]
        decoder = list(model)
        if config.video_advance is not None:
            decoder += ["--video-advance", config.video_advance]
        if config.colocate:
            decoder += ["--colocate", "--text-shards", str(config.text_shards)]
            decoder += ["--vision-shards", str(config.vision_shards)]
        else:
            for modality in Modality:
                shards = spread(config.num_shards(modality), config.num_servers(modality))
                for server, held in enumerate(shards):
                    spec = f"{AUTO_SHARDS}/{held.num_shards}" if config.autoscale else str(held)
                    flags = ["--modality", modality, "--shards", spec, *model]
                    yield f"{modality}-pool-{server}", "chiasm.services.expert_pool", flags
        yield "vision-encoder", "chiasm.services.vision_encoder", model
        yield "decoder", "chiasm.services.decoder", decoder
        yield "gateway", "chiasm.services.gateway", model

    def _orchestrator_flags(self) -> list[str]:
        config = self.config
        if not config.autoscale:
            return list(config.orchestrator_flags)
        most = str(config.max_replicas)
        flags = ["--scaling", "builtin", "--text-experts-min", str(config.text_servers)]
        for pool in ("encoder", "decoder", "text-experts", "vision-experts"):
            flags += [f"--{pool}-max", most]
        return [*flags, *config.orchestrator_flags]

    def _add_replica(self, pool: int, number: int) -> None:
        """Starts one more process of a pool, with the flags of those it began with."""
        for name, module, flags in self._services():
            if _pool_of(name) == pool:
                new = f"{_kind(name)}+{number}"
                self._spawn(new, module, 0, "--orchestrator", self.orchestrator, *flags)
                return

    def _spawn(self, name: str, module: str, port: int, *flags: str) -> None:
        # Only the public API may be reached from outside.
        host = self.config.host if name == "gateway" else LOOPBACK
        common = ["--bind", f"{host}:{port}", "--metrics-host", LOOPBACK]
        common += ["--advertise-host", LOOPBACK if host in ("0.0.0.0", "[::]") else host]
        common += ["--log-level", self.config.log_level, "--grace-s", str(self.config.grace_s / 2)]
        self.children[name] = Child(
            name,
            module,
            [*common, *flags],
            env=_environment(name),
            log_path=self.log_dir / f"{name}.log",
            fork=True,
        )

    def _await_address(self, name: str, end: float) -> str:
        while (address := self.children[name].address()) is None:
            self._pause(end, f"{name} does not listen")
        return address

    def _await_complete(self, end: float, on_progress: Callable[[Topology], None] | None) -> None:
        while not (topology := self.topology()).is_complete():
            if on_progress is not None:
                on_progress(topology)
            self._pause(end, f"not every part is ready: {describe(topology)}")

    def _pause(self, end: float, waiting_for: str) -> None:
        """One short wait of the start, unless it makes no sense to wait on."""
        if self._interrupted.wait(POLL_S):
            raise Interrupted
        for child in self.newly_dead():
            raise errors.Unavailable(
                f"{child.name} died during the start with exit code {child.exit_code}; "
                f"the end of {child.log_path}:\n" + "\n".join(child.last_lines(TAIL_LINES))
            )
        if time.monotonic() > end:
            self._dead.update(self.children)
            raise errors.Unavailable(
                f"{waiting_for} after {self.config.startup_timeout_s:g} s; logs: {self.log_dir}"
            )


def _kind(name: str) -> str:
    """The name of a process without its number."""
    return next((kind for kind in _STAGES if name.startswith(kind)), name)


def _pool_of(name: str) -> int | None:
    return _POOLS.get(_kind(name))


def _stage_of(child: Child) -> int:
    return _STAGES.index(_kind(child.name))


def spread(num_shards: int, num_servers: int) -> list[ShardSpec]:
    """The shards of each server: contiguous runs as even as possible."""
    return [
        ShardSpec(
            tuple(range(i * num_shards // num_servers, (i + 1) * num_shards // num_servers)),
            num_shards,
        )
        for i in range(num_servers)
    ]


def describe(topology: Topology) -> str:
    """Members and their states in a few words."""
    return ", ".join(f"{m.role} {m.state}" for m in topology.members) or "no members"


def _environment(name: str) -> dict[str, str]:
    """The environment of a child.

    Six processes that spin on their thread pools would starve each other, so they wait passively.
    Each may use all cores: whoever computes, the others mostly wait for it. Whatever the user has
    set stays. Only OTEL_SERVICE_NAME, which would
    make one service of all, is a prefix here, and what is meant for one process or for a client of
    another system is left out.
    """
    threads = str(cores.usable())
    environment = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    if prefix := os.environ.get("OTEL_SERVICE_NAME"):
        environment["OTEL_SERVICE_NAME"] = f"{prefix}-{_kind(name)}"
    return {name: value for name, value in environment.items() if name not in _NOT_FOR_CHILDREN}
