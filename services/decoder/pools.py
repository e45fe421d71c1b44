"""The expert pools as the engine sees them: begin a dispatch, wait for its partials.

A remote pool cuts a dispatch by server, sends every token to a server once, and repeats what failed
on another holder of the shard: expert calls are pure, so a repeated one gives the same bits. A
local pool runs the same code in this process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from opentelemetry import trace

from chiasm import errors
from chiasm.membership import Topology
from chiasm.model.experts import ExpertBank
from chiasm.model.moe import Dispatch, Partial, PendingPartials
from chiasm.services.decoder.link import ServerLink
from chiasm.telemetry import metrics, traces
from chiasm.transport import tensors
from chiasm.transport.membership import TopologyWatcher
from chiasm.types import Modality, shard_experts
from chiasm.v1 import common_pb2, experts_pb2

RETRY_PAUSE_S = 0.05
"""Pause before the same holders are tried again, when no other is left."""

HOLDER_WAIT_S = 0.5
"""How long a dispatch waits for a shard that nobody holds. The engine must not stand still for one
pool: the requests that need it are parked and begin the step again when the pool is back."""

_WIRE_MODALITY = {
    Modality.TEXT: common_pb2.MODALITY_TEXT,
    Modality.VISION: common_pb2.MODALITY_VISION,
}


class PoolUnavailable(errors.Unavailable):
    """A pool could not answer within the dispatch's time over all attempts."""

    def __init__(self, modality: Modality, message: str) -> None:
        super().__init__(message, reason="EXPERT_POOL_UNAVAILABLE", retry_after_s=1.0)
        self.modality = modality


class Pool(Protocol):
    """One modality's experts."""

    @property
    def is_covered(self) -> bool:
        """True when every shard can be computed now."""
        ...

    def begin(self, dispatch: Dispatch) -> Future[list[Partial]]: ...


class ExpertPools:
    """Both pools; an Experts for the model. Called from the engine's thread only.

    `wait_ns` sums, per modality, the time the engine stood waiting for answers.
    """

    def __init__(self, pools: dict[Modality, Pool], *, timeout_s: float) -> None:
        self._pools = pools
        self._timeout_s = timeout_s
        self.wait_ns = dict.fromkeys(Modality, 0)

    def covered(self) -> frozenset[Modality]:
        """The pools that can answer now."""
        return frozenset(m for m, pool in self._pools.items() if pool.is_covered)

    def begin(self, dispatch: Dispatch) -> PendingPartials:
        return _Pending(dispatch.modality, self._pools[dispatch.modality].begin(dispatch), self)

    def wait(self, modality: Modality, answer: Future[list[Partial]]) -> list[Partial]:
        """Waits for one answer, bounded, and books the time."""
        start = time.monotonic_ns()
        try:
            return answer.result(self._timeout_s)
        except TimeoutError:
            answer.cancel()
            raise PoolUnavailable(modality, f"the {modality} pool did not answer") from None
        finally:
            waited = time.monotonic_ns() - start
            self.wait_ns[modality] += waited
            metrics.EXPERT_WAIT_SECONDS.labels(modality).observe(waited / 1e9)


@dataclass(frozen=True, slots=True)
class _Pending:
    modality: Modality
    answer: Future[list[Partial]]
    pools: ExpertPools

    def result(self) -> Sequence[Partial]:
        return self.pools.wait(self.modality, self.answer)


class LocalPool:
    """A pool inside this process: every shard, one compute thread."""

    def __init__(self, bank: ExpertBank) -> None:
        self._bank = bank
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"{bank.modality}-experts")
        self.is_covered = True

    def begin(self, dispatch: Dispatch) -> Future[list[Partial]]:
        return self._thread.submit(self._run, dispatch)

    def _run(self, d: Dispatch) -> list[Partial]:
        with torch.inference_mode():
            return self._bank.partials(
                d.layer, self._bank.shards, d.hidden, d.expert_ids, d.expert_weights
            )


class RemotePool:
    """A pool across the network. `begin` may be called from any thread; the rest runs in `loop`."""

    def __init__(
        self,
        modality: Modality,
        watcher: TopologyWatcher,
        *,
        num_experts: int,
        attempt_timeout_s: float,
        timeout_s: float,
        max_message_bytes: int,
    ) -> None:
        self.is_covered = False
        self._modality, self._watcher, self._num_experts = modality, watcher, num_experts
        self._attempt_timeout_s, self._timeout_s = attempt_timeout_s, timeout_s
        self._max_message_bytes = max_message_bytes
        self._loop = asyncio.get_running_loop()
        self._links: dict[str, ServerLink] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._holders: dict[int, tuple[str, ...]] = {}  # shard -> addresses
        self._shard_of = torch.zeros(num_experts, dtype=torch.long)
        watcher.subscribe(self._on_topology)
        self._on_topology(watcher.current)

    def begin(self, dispatch: Dispatch) -> Future[list[Partial]]:
        return asyncio.run_coroutine_threadsafe(self._dispatch(dispatch), self._loop)

    async def close(self) -> None:
        """Closes the links."""
        await asyncio.gather(*(link.close() for link in self._links.values()))

    def _on_topology(self, topology: Topology) -> None:
        num_shards = topology.num_shards(self._modality)
        for shard in range(num_shards):
            experts = shard_experts(shard, num_shards, self._num_experts)
            self._shard_of[experts.start : experts.stop] = shard
        self._holders = {
            shard: tuple(m.address for m in topology.holders(self._modality, shard))
            for shard in range(num_shards)
        }
        self.is_covered = num_shards > 0 and all(self._holders.values())
        members = {m.address for m in topology.members}
        for address in [a for a in self._links if a not in members]:
            # The orchestrator gave it up, dead or hung: calls in flight go to another holder now.
            self._closing(self._links.pop(address))

    async def _dispatch(self, dispatch: Dispatch) -> list[Partial]:
        """Partials of every shard the tokens need; repeats what fails while time is left."""
        deadline = time.monotonic() + self._timeout_s
        work = _Work.prepare(dispatch, self._shard_of, len(self._holders))
        missing, partials, failed = set(work.shards), [], set[str]()
        attempt, last_error = 0, "no holder is known"
        while missing:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not await self._held(missing, min(left_s, HOLDER_WAIT_S)):
                raise PoolUnavailable(
                    self._modality,
                    f"{self._modality} shards {sorted(missing)} are not available: {last_error}",
                )
            plan = self._plan(missing, failed)
            if plan is None:
                failed.clear()
                await asyncio.sleep(min(left_s, RETRY_PAUSE_S))
                continue
            answers = await asyncio.gather(
                *(
                    self._send(work, address, shards, attempt, min(left_s, self._attempt_timeout_s))
                    for address, shards in plan.items()
                ),
                return_exceptions=True,
            )
            for (address, shards), answer in zip(plan.items(), answers, strict=True):
                if isinstance(answer, BaseException):
                    if not isinstance(answer, _RETRIED):
                        raise answer
                    failed.add(address)
                    last_error = str(answer)
                else:
                    partials.extend(answer)
                    missing.difference_update(shards)
            attempt += 1
        return partials

    def _plan(self, shards: set[int], avoid: set[str]) -> dict[str, list[int]] | None:
        """A holder for each shard, least loaded first; None when some shard has none left."""
        plan: dict[str, list[int]] = {}
        for shard in sorted(shards):
            holders = [a for a in self._holders.get(shard, ()) if a not in avoid]
            if not holders:
                return None
            # A server that is in the plan already takes another shard for free.
            best = min(holders, key=lambda a: (a not in plan, self._load(a)))
            plan.setdefault(best, []).append(shard)
        return plan

    def _load(self, address: str) -> int:
        link = self._links.get(address)
        return link.num_pending if link is not None else 0

    def _link(self, address: str) -> ServerLink:
        link = self._links.get(address)
        if link is None or link.is_broken:
            if link is not None:
                self._closing(link)
            link = ServerLink(address, max_message_bytes=self._max_message_bytes)
            self._links[address] = link
        return link

    def _closing(self, link: ServerLink) -> None:
        task = self._loop.create_task(link.close())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(
        self, work: _Work, address: str, shards: list[int], attempt: int, timeout_s: float
    ) -> list[Partial]:
        with traces.child(
            f"dispatch {self._modality}",
            kind=trace.SpanKind.CLIENT,
            attributes={
                "server.address": address,
                "chiasm.modality": str(self._modality),
                "chiasm.layer": work.dispatch.layer,
                "chiasm.shards": shards,
                "chiasm.attempt": attempt,
            },
        ):
            request, rows = work.request(shards, attempt)
            response = await self._link(address).call(request, timeout_s=timeout_s)
            return _partials(response.partials, rows, shards, work.dispatch.hidden.shape[1])

    async def _held(self, shards: set[int], timeout_s: float) -> bool:
        """Whether every shard has a holder, now or within the time."""
        try:
            await self._watcher.wait_for(
                lambda _: all(self._holders.get(shard) for shard in shards),
                timeout_s=timeout_s,
                what="a holder",
            )
        except errors.Unavailable:
            return False
        return True


_RETRIED = (
    errors.Unavailable,
    errors.DeadlineExceeded,
    errors.DataLoss,
    errors.ResourceExhausted,
    errors.NotFound,
)
"""Failures of a server, not of the dispatch: another holder, or the same one later, may do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A dispatch on the host and the shards it touches."""

    dispatch: Dispatch
    num_shards: int
    shard_ids: torch.Tensor  # int64 [T, K]
    shards: tuple[int, ...]

    @classmethod
    def prepare(cls, dispatch: Dispatch, shard_of: torch.Tensor, num_shards: int) -> _Work:
        shard_ids = shard_of[dispatch.expert_ids.cpu().long()]
        return cls(
            dispatch=dispatch,
            num_shards=num_shards,
            shard_ids=shard_ids,
            shards=tuple(torch.unique(shard_ids).tolist()),
        )

    def request(
        self, shards: list[int], attempt: int
    ) -> tuple[experts_pb2.DispatchRequest, torch.Tensor]:
        """The message for one server, and which rows of the dispatch it carries, int64 [n]."""
        wanted = torch.isin(self.shard_ids, torch.tensor(shards))
        rows = wanted.any(dim=-1).nonzero().squeeze(-1)
        d, context = self.dispatch, traces.inject()
        return experts_pb2.DispatchRequest(
            modality=_WIRE_MODALITY[d.modality],
            layer=d.layer,
            shards=shards,
            num_shards=self.num_shards,
            hidden=tensors.to_wire(d.hidden.cpu()[rows]),
            expert_ids=tensors.to_wire(d.expert_ids.cpu()[rows]),
            expert_weights=tensors.to_wire(d.expert_weights.cpu()[rows]),
            attempt=attempt,
            traceparent=context.get("traceparent", ""),
            tracestate=context.get("tracestate", ""),
        ), rows


def _partials(
    wire: experts_pb2.Partials, rows: torch.Tensor, shards: list[int], hidden_size: int
) -> list[Partial]:
    """A server's answer in rows of the whole dispatch. Raises DataLoss when it does not fit."""
    found = []
    for entry in wire.shards:
        local = tensors.from_wire(entry.rows, name="rows").long()
        values = tensors.from_wire(entry.values, name="values")
        if values.shape != (local.numel(), hidden_size) or values.dtype is not torch.float32:
            raise errors.DataLoss(f"shard {entry.shard}: values of shape {tuple(values.shape)}")
        if local.numel() and not 0 <= int(local.min()) <= int(local.max()) < rows.numel():
            raise errors.DataLoss(f"shard {entry.shard}: rows outside the dispatch")
        found.append(Partial(shard=entry.shard, rows=rows[local].to(torch.int32), values=values))
    if [p.shard for p in found] != shards:
        raise errors.DataLoss(f"asked for shards {shards}, got {[p.shard for p in found]}")
    return found
