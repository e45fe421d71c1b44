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

from chiasm import errors
from chiasm.model.experts import ExpertBank
from chiasm.model.moe import Dispatch, Partial, PendingPartials
from chiasm.services.decoder.holders import ShardHolders
from chiasm.services.decoder.link import NoAnswer, ServerLink
from chiasm.telemetry import metrics, traces
from chiasm.transport import tensors
from chiasm.transport.enums import WIRE_MODALITIES
from chiasm.transport.membership import TopologyWatcher
from chiasm.types import Modality
from chiasm.v1 import experts_pb2

RETRY_PAUSE_S = 0.05
"""Pause before the same holders are tried again, when no other is left."""


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
        self._modality = modality
        self._attempt_timeout_s, self._timeout_s = attempt_timeout_s, timeout_s
        self._max_message_bytes = max_message_bytes
        self._loop = asyncio.get_running_loop()
        self._links: dict[str, ServerLink] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._holders = ShardHolders(
            modality, watcher, num_experts=num_experts, on_gone=self._close_link
        )

    @property
    def is_covered(self) -> bool:
        return self._holders.is_covered

    def begin(self, dispatch: Dispatch) -> Future[list[Partial]]:
        return asyncio.run_coroutine_threadsafe(self._dispatch(dispatch), self._loop)

    async def close(self) -> None:
        """Closes the links."""
        await self._holders.close()
        await asyncio.gather(*(link.close() for link in self._links.values()), *self._tasks)

    async def _dispatch(self, dispatch: Dispatch) -> list[Partial]:
        """Partials of every shard the tokens need; repeats what fails while time is left.

        Raises PoolUnavailable as soon as a shard has no holder that can be reached: the engine must
        not stand still for one pool, it begins the step again when the pool is back.
        """
        deadline = time.monotonic() + self._timeout_s
        work = _Work.prepare(dispatch, self._holders)
        missing, partials, failed = set(work.shards), [], set[str]()
        attempt = 0
        last_error: errors.ChiasmError = errors.Unavailable("no server can be reached")
        while missing:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self._can_compute(missing, work.num_shards):
                raise PoolUnavailable(
                    self._modality,
                    f"{self._modality} shards {sorted(missing)} are not available: {last_error}",
                )
            plan = self._plan(missing, failed)
            if plan is None:
                if not isinstance(last_error, _TRANSIENT):
                    raise last_error
                failed.clear()
                await asyncio.sleep(min(left_s, RETRY_PAUSE_S))
                continue
            timeout_s = min(left_s, self._attempt_timeout_s)
            answers = await asyncio.gather(
                *(self._try(work, a, shards, attempt, timeout_s) for a, shards in plan.items())
            )
            for (address, shards), answer in zip(plan.items(), answers, strict=True):
                if isinstance(answer, errors.ChiasmError):
                    failed.add(address)
                    last_error = answer
                else:
                    partials.extend(answer)
                    missing.difference_update(shards)
            attempt += 1
        return partials

    def _can_compute(self, shards: set[int], num_shards: int) -> bool:
        """Whether the pool is still cut as it was and each shard has a holder."""
        return num_shards == self._holders.num_shards and all(map(self._holders.of, shards))

    def _plan(self, shards: set[int], avoid: set[str]) -> dict[str, list[int]] | None:
        """A holder for each shard, least loaded first; None when some shard has none left."""
        plan: dict[str, list[int]] = {}
        for shard in sorted(shards):
            holders = [a for a in self._holders.of(shard) if a not in avoid]
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
        if link is None:
            link = ServerLink(address, max_message_bytes=self._max_message_bytes)
            self._links[address] = link
        return link

    def _close_link(self, address: str) -> None:
        """Dead, hung or gone: calls in flight fail now and go to another holder."""
        if link := self._links.pop(address, None):
            task = self._loop.create_task(link.close())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _try(
        self, work: _Work, address: str, shards: list[int], attempt: int, timeout_s: float
    ) -> list[Partial] | errors.ChiasmError:
        """The partials, or why there are none; a server that cannot be reached is taken out."""
        link = self._link(address)
        try:
            return await self._send(work, link, shards, attempt, timeout_s)
        except errors.ChiasmError as error:
            if link.is_broken or isinstance(error, NoAnswer):
                self._holders.lost(address)
                if self._links.get(address) is link:
                    self._close_link(address)
            return error

    async def _send(
        self, work: _Work, link: ServerLink, shards: list[int], attempt: int, timeout_s: float
    ) -> list[Partial]:
        with traces.child(
            f"dispatch {self._modality}",
            kind=traces.CLIENT,
            attributes={
                **traces.peer(link.address),
                "chiasm.modality": str(self._modality),
                "chiasm.layer": work.dispatch.layer,
                "chiasm.shards": shards,
                "chiasm.attempt": attempt,
            },
        ):
            request, rows = work.request(shards, attempt)
            response = await link.call(request, timeout_s=timeout_s)
            return _partials(response.partials, rows, shards, work.dispatch.hidden.shape[1])


_TRANSIENT = (
    errors.Unavailable,
    errors.DeadlineExceeded,
    errors.DataLoss,
    errors.ResourceExhausted,
    errors.NotFound,
)
"""Failures that the same server may get over; any other is final once every holder has had it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A dispatch on the host and the shards it touches."""

    dispatch: Dispatch
    num_shards: int
    shard_ids: torch.Tensor  # int64 [T, K]
    shards: tuple[int, ...]

    @classmethod
    def prepare(cls, dispatch: Dispatch, holders: ShardHolders) -> _Work:
        shard_ids = holders.shards_of(dispatch.expert_ids)
        return cls(
            dispatch=dispatch,
            num_shards=holders.num_shards,
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
            modality=WIRE_MODALITIES[d.modality],
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
