"""From signals to observations: a fold over time, without a clock of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from chiasm.load import DecoderLoad, EncoderLoad, ExpertLoad, Load, ShardLoad
from chiasm.membership import MemberInfo, Role, Topology
from chiasm.orchestrator.demand import Cost, Demand, Moment, Span, demand, is_wanted
from chiasm.orchestrator.types import LoadReport, Pool, PoolConfig, Signals, pool_of
from chiasm.types import Modality

MEMORY_S = 60.0
"""Time constant with which measured paces and the loads of shards are forgotten."""

_SOURCES: Mapping[Pool, frozenset[Role]] = {
    Pool.ENCODER: frozenset({Role.GATEWAY, Role.VISION_ENCODER}),
    Pool.DECODER: frozenset({Role.GATEWAY, Role.DECODER}),
    Pool.TEXT_EXPERTS: frozenset({Role.GATEWAY, Role.EXPERT_POOL}),
    Pool.VISION_EXPERTS: frozenset(Role),
}
"""Whose reports the demand of a pool is made from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    """What a decision about one pool is made from.

    replicas: as the backend has them. floor: fewest that can hold every shard.
    is_wanted: somebody has work for the pool, or waits for it; known even when `demand` is not.
    demand: None where a report is missing; `gap` tells whose.
    absent: replicas that are not there, or not ready.
    obstacle: why none of those there may be taken away now; empty when nothing stands in the way.
    """

    replicas: int
    floor: int = 1
    is_wanted: bool = False
    demand: Demand | None = None
    gap: str = ""
    absent: int = 0
    obstacle: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """All pools at one moment. shard_loads: seconds of compute of each shard, of late."""

    at: float
    pools: Mapping[Pool, PoolView]
    shard_loads: Mapping[Modality, tuple[float, ...]]


class Observer:
    """Takes signals in order of time.

    A member that is not warm yet counts with its queue, which is real, but not with its pace.
    """

    def __init__(self, configs: Mapping[Pool, PoolConfig]) -> None:
        self._configs = configs
        self._at = 0.0
        self._ready_since: dict[str, float] = {}
        self._last: dict[str, LoadReport] = {}
        self._spans: dict[str, Span[Load]] = {}
        self._patch_pace, self._item_size = _Ratio(), _Ratio()
        self._token_pace = {modality: _Ratio() for modality in Modality}
        self._plain, self._media = _Costs(), _Costs()
        self._shards: dict[Modality, dict[int, float]] = {m: {} for m in Modality}
        self._floors = dict.fromkeys(Pool, 1)

    def observe(self, signals: Signals) -> Observation:
        """What the pools look like now."""
        self._meet(signals)
        self._forget(max(0.0, signals.at - self._at))
        self._at = signals.at
        for member in signals.topology.members:
            self._measure(member, signals.loads.get(member.member_id))
        members = {m.member_id: pool_of(m) for m in signals.topology.members}
        moment = Moment(
            pools=members,
            loads={i: r.load for i, r in signals.loads.items() if i in members},
            spans=dict(self._spans),
            patch_s=self._patch_pace.value,
            vision_token_s=self._token_pace[Modality.VISION].value,
            text_token_s=self._token_pace[Modality.TEXT].value,
            item_patches=self._item_size.value,
            plain_cost=self._plain.cost,
            media_cost=self._media.cost,
        )
        return Observation(
            at=signals.at,
            pools={p: self._view(p, signals, moment) for p in signals.replicas},
            shard_loads={
                m: tuple(self._shards[m].get(s, 0.0) for s in range(signals.topology.num_shards(m)))
                for m in Modality
            },
        )

    def _view(self, pool: Pool, signals: Signals, moment: Moment) -> PoolView:
        replicas, gap = signals.replicas[pool], self._gap(pool, signals)
        members = [m for m in signals.topology.members if pool_of(m) is pool]
        return PoolView(
            replicas=replicas,
            floor=self._floor(pool, signals.topology),
            is_wanted=is_wanted(pool, moment),
            demand=None if gap else demand(pool, moment, self._configs[pool], replicas),
            gap=gap,
            absent=max(0, replicas - sum(m.is_ready for m in members)),
            obstacle=_obstacle(pool, signals.topology, len(members) - replicas),
        )

    def _meet(self, signals: Signals) -> None:
        """Books who is ready since when, and forgets who is gone."""
        members = signals.topology.members
        self._ready_since = {
            m.member_id: self._ready_since.get(m.member_id, signals.at)
            for m in members
            if m.is_ready
        }
        present = {m.member_id for m in members}
        for member_id in self._last.keys() - present:
            del self._last[member_id]
            self._spans.pop(member_id, None)

    def _forget(self, elapsed_s: float) -> None:
        factor = math.exp(-elapsed_s / MEMORY_S)
        ratios = (self._patch_pace, self._item_size, *self._token_pace.values())
        for ratio in (*ratios, *self._plain.ratios, *self._media.ratios):
            ratio.fade(factor)
        for loads in self._shards.values():
            for shard in loads:
                loads[shard] *= factor

    def _measure(self, member: MemberInfo, report: LoadReport | None) -> None:
        """Books what a member did between its last two reports."""
        if report is None:
            return
        last = self._last.get(member.member_id)
        if last is not None and report.at <= last.at:
            return
        self._last[member.member_id] = report
        if isinstance(report.load, EncoderLoad):
            self._item_size.add(report.load.queued_items, report.load.queued_patches)
        if last is None:
            return
        done = _difference(report.load, last.load)
        self._spans[member.member_id] = Span(seconds=report.at - last.at, done=done)
        pool = pool_of(member)
        match done:
            case EncoderLoad() if self._is_warm(member, Pool.ENCODER):
                self._patch_pace.add(done.encoded_patches_total, done.busy_s_total)
            case DecoderLoad():
                self._token_pace[Modality.VISION].add(done.vision_tokens_total, 0.0)
                self._token_pace[Modality.TEXT].add(done.text_tokens_total, 0.0)
                self._plain.add(
                    done.plain_answers_total, done.plain_held_s_total, done.plain_tokens_total
                )
                self._media.add(
                    done.media_answers_total, done.media_held_s_total, done.media_tokens_total
                )
            case ExpertLoad() if pool is not None and pool.modality is not None:
                self._token_pace[pool.modality].add(0, done.compute_s_total)
                loads = self._shards[pool.modality]
                for shard in done.shards:
                    loads[shard.shard] = loads.get(shard.shard, 0.0) + shard.compute_s_total

    def _is_warm(self, member: MemberInfo, pool: Pool) -> bool:
        since = self._ready_since.get(member.member_id)
        return since is not None and self._at - since >= self._configs[pool].warm_up_s

    def _gap(self, pool: Pool, signals: Signals) -> str:
        """Whose report the demand of a pool lacks; empty when all are there."""
        for member in signals.topology.members:
            is_source = member.role in _SOURCES[pool] and (
                member.role is not Role.EXPERT_POOL or pool_of(member) is pool
            )
            if not is_source or not self._is_warm(member, pool):
                continue
            report = signals.loads.get(member.member_id)
            if report is None or signals.at - report.at > self._configs[pool].stale_s:
                return f"no report of {member.member_id}"
            if member.member_id not in self._spans:
                return f"only one report of {member.member_id} yet"
        return ""

    def _floor(self, pool: Pool, topology: Topology) -> int:
        """Fewest servers that hold every shard, by what the servers there can hold."""
        modality = pool.modality
        if modality is not None and (num_shards := topology.num_shards(modality)):
            held = [
                found
                for member in topology.members
                if member.role is Role.EXPERT_POOL and (found := member.shard_set(modality))
            ]
            fixed = {shard for h in held if not h.max_shards for shard in h.shards}
            room = [h.max_shards for h in held if h.max_shards]
            if room:
                self._floors[pool] = max(1, -(-(num_shards - len(fixed)) // min(room)))
        return self._floors[pool]


class _Ratio:
    """Of two sums, in which the latest count most; as seconds per patch."""

    def __init__(self) -> None:
        self._below = self._above = 0.0
        self.value: float | None = None

    def add(self, below: float, above: float) -> None:
        """The two may come one after the other, from different members."""
        self._below += below
        self._above += above
        if self._below > 0 and self._above > 0:
            self.value = self._above / self._below

    def fade(self, factor: float) -> None:
        """What was added so far weighs less from now on; the value stays."""
        self._below *= factor
        self._above *= factor


class _Costs:
    """What answers of one kind have taken of late."""

    def __init__(self) -> None:
        self.ratios = (_Ratio(), _Ratio())

    def add(self, answers: int, held_s: float, tokens: int) -> None:
        """Answers that ended, and their sums."""
        held, computed = self.ratios
        held.add(answers, held_s)
        computed.add(answers, tokens)

    @property
    def cost(self) -> Cost | None:
        """Of one answer; None while none has ended."""
        held, computed = (ratio.value for ratio in self.ratios)
        if held is None or computed is None:
            return None
        return Cost(held_s=held, tokens=computed)


def _difference(new: Load, old: Load) -> Load:
    """The load, with totals that count from the older report."""
    names = [field.name for field in fields(new) if field.name.endswith("_total")]
    since = {name: getattr(new, name) - getattr(old, name, 0) for name in names}
    if not (isinstance(new, ExpertLoad) and isinstance(old, ExpertLoad)):
        return replace(new, **since)
    before = {s.shard: s for s in old.shards}
    shards = tuple(
        ShardLoad(
            shard=s.shard,
            tokens_total=s.tokens_total - before[s.shard].tokens_total,
            compute_s_total=s.compute_s_total - before[s.shard].compute_s_total,
        )
        if s.shard in before
        else s
        for s in new.shards
    )
    return replace(new, **since, shards=shards)


def _obstacle(pool: Pool, topology: Topology, surplus: int) -> str:
    """Why a pool with `surplus` members more than are wanted must not lose a ready one now."""
    if topology.settling:
        return "members are still coming back"
    if surplus > 0:
        return "more members are there than are wanted"
    if pool.modality is not None and (missing := topology.missing(pool.modality)):
        return f"no server for shards {','.join(map(str, missing))}"
    return ""
