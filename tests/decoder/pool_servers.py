"""Expert servers in the test's own process, a decoder's pool in front of them, and faults."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import torch

from chiasm.membership import MemberInfo, MemberState, Role, ShardSet, Topology
from chiasm.model.checkpoint import Checkpoint
from chiasm.model.config import ModelConfig
from chiasm.model.experts import ExpertBank
from chiasm.model.moe import Dispatch, Partial
from chiasm.services.decoder.link import Connection
from chiasm.services.decoder.remote import RemotePool, RemoteSettings
from chiasm.services.expert_pool.engine import ExpertEngine
from chiasm.services.expert_pool.servicer import ExpertPoolServicer
from chiasm.services.expert_pool.wire import DispatchLimits
from chiasm.telemetry import metrics
from chiasm.transport.channel import options
from chiasm.transport.messages import answer_bytes
from chiasm.types import Modality
from chiasm.v1 import experts_pb2, experts_pb2_grpc

T = TypeVar("T")

NUM_SHARDS = 4
LAYER = 2
MAX_TOKENS = 128
WAIT_S = 20.0

PartialsHook = Callable[[list[Partial]], list[Partial]]
ResponseHook = Callable[[experts_pb2.DispatchResponse], Awaitable[None]]


def load_bank(path: Path, config: ModelConfig, shards: Iterable[int]) -> ExpertBank:
    """Text experts, float32."""
    bank = ExpertBank(
        config,
        modality=Modality.TEXT,
        num_shards=NUM_SHARDS,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with Checkpoint(path, config) as checkpoint:
        for shard in shards:
            bank.load(checkpoint, shard)
    return bank


def dispatch(config: ModelConfig, num_tokens: int, seed: int = 0, layer: int = LAYER) -> Dispatch:
    """Random tokens with random experts."""
    g = torch.Generator().manual_seed(seed)
    text = config.text
    ids = torch.stack(
        [torch.randperm(text.num_experts, generator=g)[: text.moe_k] for _ in range(num_tokens)]
    )
    return Dispatch(
        modality=Modality.TEXT,
        layer=layer,
        hidden=torch.randn(num_tokens, text.hidden_size, generator=g),
        expert_ids=ids.to(torch.int32),
        expert_weights=torch.rand(num_tokens, text.moe_k, generator=g),
    )


class FaultyBank:
    """A bank whose answers pass a hook, on the compute thread: it may wait, change or raise."""

    def __init__(self, bank: ExpertBank) -> None:
        self._bank = bank
        self.hook: PartialsHook | None = None
        self.num_calls = 0

    def partials(self, *args: Any) -> Iterable[Partial]:
        self.num_calls += 1
        found = self._bank.partials(*args)
        return self.hook(list(found)) if self.hook is not None else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bank, name)


class Relay(experts_pb2_grpc.ExpertPoolServicer):
    """Stands before a servicer without a lane; its hooks may change what passes."""

    def __init__(self, servicer: ExpertPoolServicer) -> None:
        self._servicer = servicer
        self.on_request: Callable[[experts_pb2.DispatchRequest], None] | None = None
        self.on_response: Callable[[experts_pb2.DispatchResponse], None] | None = None

    async def Describe(
        self, request: experts_pb2.DescribeRequest, context: Any
    ) -> experts_pb2.PoolDescription:
        description = await self._servicer.Describe(request, context)
        description.ClearField("lane")
        return description

    async def Dispatch(
        self, requests: AsyncIterator[experts_pb2.DispatchRequest], context: Any
    ) -> AsyncIterator[experts_pb2.DispatchResponse]:
        async def passing() -> AsyncIterator[experts_pb2.DispatchRequest]:
            async for request in requests:
                if self.on_request is not None:
                    self.on_request(request)
                yield request

        async for response in self._servicer.Dispatch(passing(), context):
            if self.on_response is not None:
                self.on_response(response)
            yield response


def sleep(seconds: float) -> Callable[[list[Partial]], list[Partial]]:
    """Makes a server slow."""

    def hook(found: list[Partial]) -> list[Partial]:
        time.sleep(seconds)
        return found

    return hook


@dataclass(kw_only=True)
class Server:
    """A running server."""

    address: str
    shards: tuple[int, ...]
    bank: FaultyBank
    engine: ExpertEngine
    servicer: ExpertPoolServicer
    relay: Relay
    grpc: grpc.aio.Server

    async def kill(self) -> None:
        """Ends it without a word: stream and lanes break."""
        self.engine.worker.close()
        await self.grpc.stop(None)
        lanes = self.servicer._lanes
        if lanes is not None:
            lanes.close()


class Watcher:
    """A topology that the test sets."""

    def __init__(self) -> None:
        self.current = Topology()
        self._subscribers: list[Callable[[Topology], None]] = []

    def subscribe(self, callback: Callable[[Topology], None]) -> Callable[[], None]:
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def publish(self, servers: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Exactly these servers are ready."""
        members = tuple(
            MemberInfo(
                member_id=address,
                role=Role.EXPERT_POOL,
                address=address,
                state=MemberState.READY,
                shard_sets=(
                    ShardSet(modality=Modality.TEXT, num_shards=NUM_SHARDS, shards=shards),
                ),
            )
            for address, shards in servers
        )
        self.current = Topology(
            instance_id="test", version=self.current.version + 1, settling=False, members=members
        )
        for callback in tuple(self._subscribers):
            callback(self.current)


@dataclass(kw_only=True)
class Pool:
    """A decoder's pool and its servers; `whole` holds every shard, to compare with.

    `lane`: whether the servers offer one.
    """

    config: ModelConfig
    model: Path
    whole: ExpertBank
    lane: bool
    watcher: Watcher
    remote: RemotePool
    servers: list[Server] = field(default_factory=list)
    engine_thread: ThreadPoolExecutor

    async def on_engine(self, work: Callable[[], T]) -> T:
        """Runs something on the one thread that may use the pool."""
        return await asyncio.get_running_loop().run_in_executor(self.engine_thread, work)

    async def ask(self, sent: Dispatch) -> list[Partial]:
        """Sends a dispatch and waits for its answer."""
        return await self.on_engine(lambda: self.remote.begin(sent).result(WAIT_S))

    def expected(self, sent: Dispatch) -> list[Partial]:
        """The answer of the pool in peace."""
        needed = self.whole.partials(
            sent.layer, self.whole.shards, sent.hidden, sent.expert_ids, sent.expert_weights
        )
        return [p for p in needed if p.rows.numel()]

    async def check(self, num_tokens: int, seed: int) -> None:
        """Asks for random tokens and asserts the bits."""
        sent = dispatch(self.config, num_tokens, seed)
        assert_same(await self.ask(sent), self.expected(sent))

    async def reachable(self, num_servers: int) -> None:
        """Returns when so many servers are up, with their lanes where they have them."""
        end = time.monotonic() + WAIT_S
        while not await self._has(num_servers):
            assert time.monotonic() < end, "servers do not become reachable"
            await asyncio.sleep(0.01)

    async def _has(self, num_servers: int) -> bool:
        await self.on_engine(self.remote.tidy)  # a lane that is open is taken over there
        connections = self._connections()
        return len(connections) == num_servers and not any(
            c.is_broken or (self.lane and c._lane is None) for c in connections
        )

    def _connections(self) -> set[Connection]:
        return {c for held in self.remote.placement.holders.values() for c in held}


def assert_same(found: list[Partial], expected: list[Partial]) -> None:
    """Bit for bit, shard by shard."""
    found = sorted(found, key=lambda p: p.shard)
    assert [p.shard for p in found] == [p.shard for p in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.rows, theirs.rows)
        assert torch.equal(mine.values, theirs.values)


@asynccontextmanager
async def serving(
    model: Path, config: ModelConfig, shards: tuple[int, ...], *, lane: bool
) -> AsyncIterator[Server]:
    """One server."""
    bank = FaultyBank(load_bank(model, config, shards))
    engine = ExpertEngine(bank, model=model, config=config)  # type: ignore[arg-type]  # a stand-in
    limits = DispatchLimits(
        modality=Modality.TEXT,
        num_shards=NUM_SHARDS,
        dtype=torch.float32,
        max_tokens=MAX_TOKENS,
        max_queued=256,
        max_queued_bytes=1 << 30,
        text=config.text,
    )
    servicer = ExpertPoolServicer(engine, limits, max_assigned=NUM_SHARDS, on_change=lambda: None)
    relay = Relay(servicer)
    message_bytes = answer_bytes(MAX_TOKENS, config.text.hidden_size, config.text.moe_k)
    server = grpc.aio.server(options=options(message_bytes))
    experts_pb2_grpc.add_ExpertPoolServicer_to_server(servicer if lane else relay, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    running = Server(
        address=f"127.0.0.1:{port}",
        shards=shards,
        bank=bank,
        engine=engine,
        servicer=servicer,
        relay=relay,
        grpc=server,
    )
    try:
        yield running
    finally:
        await running.kill()
        engine.close()


@asynccontextmanager
async def pool_of(
    model: Path,
    *held: tuple[int, ...],
    lane: bool = True,
    hedge_budget: float = 0.0,
    hedge_after_s: float = 0.0,
    attempt_timeout_s: float = 5.0,
    timeout_s: float = 10.0,
) -> AsyncIterator[Pool]:
    """A pool of servers with these shards; `lane`: whether they offer one."""
    config = ModelConfig.load(model)
    watcher = Watcher()
    remote = RemotePool(
        Modality.TEXT,
        watcher,  # type: ignore[arg-type]  # a stand-in
        RemoteSettings(
            attempt_timeout_s=attempt_timeout_s,
            timeout_s=timeout_s,
            hedge_budget=hedge_budget,
            hedge_after_s=hedge_after_s,
            use_lane=True,
            max_message_bytes=answer_bytes(MAX_TOKENS, config.text.hidden_size, config.text.moe_k),
        ),
        num_experts=config.text.num_experts,
    )
    async with AsyncExitStack() as stack:
        pool = Pool(
            config=config,
            model=model,
            whole=load_bank(model, config, range(NUM_SHARDS)),
            lane=lane,
            watcher=watcher,
            remote=remote,
            engine_thread=stack.enter_context(ThreadPoolExecutor(1)),
        )
        for shards in held:
            server = serving(model, config, shards, lane=lane)
            pool.servers.append(await stack.enter_async_context(server))
        watcher.publish([(s.address, s.shards) for s in pool.servers])
        try:
            await pool.reachable(len(held))
            yield pool
        finally:
            await remote.close()


def count(metric: Any, *labels: str) -> float:
    """The value of a counter."""
    return float(metric.labels(*labels)._value.get())


def sent_by(way: str) -> float:
    return count(metrics.DISPATCHES_SENT, "text", way)


def hedges(outcome: str) -> float:
    return count(metrics.HEDGES, "text", outcome)
