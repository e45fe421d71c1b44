"""From loads to demand: how many fully used replicas each pool would need. Pure.

| pool | demand | strain |
|---|---|---|
| encoder | work of the patches that arrive in a second, and of those queued over `target_s`; while no encoder is there, of the items that gateways take in and hold | age of the oldest item over `target_s`, while items outnumber encoders |
| vision experts | the same of vision tokens: those of prompts in hand, and those that the items before them will become | none |
| text experts | dispatches in flight, waiting ones included: their rate x their time (Little's law); or, if that is more, text tokens of the answers that are asked for in a second | mean wait for the compute thread over `target_s` |
| decoder | KV cache and places of the batch in use, and what the waiting requests will take; or, if that is more, places of the answers asked for: their rate x the time they hold one | mean step over `target_s`, while requests share decoders |

Demand does not depend on the number of replicas; strain is what this number of them suffers.
"""  # noqa: E501 # a table

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from chiasm.load import DecoderLoad, EncoderLoad, ExpertLoad, GatewayLoad, Load
from chiasm.orchestrator.types import Pool, PoolConfig

PATCHES_PER_TOKEN = 4
"""Patches of an image that become one vision token; of a video it takes twice as many."""

UNKNOWN_PACE_USE = 0.5
"""Use of replicas that have work, while it is not known how fast they are."""

LoadT = TypeVar("LoadT", bound=Load)
LoadT_co = TypeVar("LoadT_co", bound=Load, covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """replicas: fully used replicas that would do. strain: measured time over target; above 1 more
    replicas are needed, whatever their use."""

    replicas: float
    strain: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Span(Generic[LoadT_co]):
    """The time between a member's last two reports; the totals of `done` count it alone."""

    seconds: float
    done: LoadT_co


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What an answer takes on average: held_s of a place in a decoder's batch, and text tokens."""

    held_s: float
    tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Loads as they stand, and what was done of late, by member_id.

    patch_s, vision_token_s, text_token_s: time of a replica per patch, per vision token of a
    prompt, and per text token. item_patches: patches of a media item. plain_cost, media_cost: of
    answers to prompts without and with media. None while they have not been measured.
    """

    pools: Mapping[str, Pool | None]
    loads: Mapping[str, Load]
    spans: Mapping[str, Span[Load]]
    patch_s: float | None = None
    vision_token_s: float | None = None
    text_token_s: float | None = None
    item_patches: float | None = None
    plain_cost: Cost | None = None
    media_cost: Cost | None = None

    def of(self, kind: type[LoadT]) -> Sequence[LoadT]:
        """The loads of one kind."""
        return [load for load in self.loads.values() if isinstance(load, kind)]

    def done(self, kind: type[LoadT], pool: Pool | None = None) -> Sequence[Span[LoadT]]:
        """The spans of one kind; of one pool's members, if it is given."""
        return [
            Span(seconds=span.seconds, done=span.done)
            for member, span in self.spans.items()
            if isinstance(span.done, kind) and pool in (None, self.pools[member])
        ]


def demand(pool: Pool, moment: Moment, config: PoolConfig, replicas: int) -> Demand:
    """Demand for a pool that has so many replicas."""
    return _DEMANDS[pool](moment, config, replicas)


def is_wanted(pool: Pool, moment: Moment) -> bool:
    """Whether somebody has work for a pool, or waits for it."""
    decoders = moment.of(DecoderLoad)
    has_media = any(g.waiting_encoder for g in moment.of(GatewayLoad)) or any(
        e.queued_items for e in moment.of(EncoderLoad)
    )
    match pool:
        case Pool.ENCODER:
            return has_media
        case Pool.VISION_EXPERTS:
            # An image on its way through the encoder will want the experts next.
            return has_media or any(
                d.queued_vision_tokens or d.waiting_vision_pool for d in decoders
            )
        case Pool.TEXT_EXPERTS:
            return any(d.running_requests or d.waiting_requests for d in decoders)
        case Pool.DECODER:
            return any(g.waiting_decoder for g in moment.of(GatewayLoad)) or any(
                d.running_requests or d.waiting_requests for d in decoders
            )


def _encoder(moment: Moment, config: PoolConfig, replicas: int) -> Demand:
    loads = moment.of(EncoderLoad)
    parked = _parked(moment)
    items = parked + sum(load.queued_items for load in loads)
    oldest_s = max((load.oldest_wait_s for load in loads), default=0.0)
    strain = oldest_s / config.target_s if items > replicas else 0.0
    if moment.patch_s is None:
        return Demand(replicas=UNKNOWN_PACE_USE * replicas if items else 0.0, strain=strain)
    patches = parked * (moment.item_patches or 0.0) + sum(load.queued_patches for load in loads)
    backlog = patches * moment.patch_s / config.target_s
    # Items cannot be shared: more encoders than items would not help.
    return Demand(
        replicas=_arriving_patches(moment) * moment.patch_s + min(backlog, items), strain=strain
    )


def _vision_experts(moment: Moment, config: PoolConfig, replicas: int) -> Demand:
    tokens = sum(load.queued_vision_tokens for load in moment.of(DecoderLoad))
    patches = sum(load.queued_patches for load in moment.of(EncoderLoad))
    patches += round(_parked(moment) * (moment.item_patches or 0.0))
    tokens += patches // PATCHES_PER_TOKEN
    busy = _busy(moment, Pool.VISION_EXPERTS)
    if moment.vision_token_s is None:
        return Demand(replicas=max(busy, UNKNOWN_PACE_USE * replicas if tokens else 0.0))
    pace_s = moment.vision_token_s
    arriving = _arriving_patches(moment) / PATCHES_PER_TOKEN * pace_s
    return Demand(replicas=max(busy, arriving) + tokens * pace_s / config.target_s)


def _text_experts(moment: Moment, config: PoolConfig, replicas: int) -> Demand:
    spans = moment.done(ExpertLoad, Pool.TEXT_EXPERTS)
    busy = _busy(moment, Pool.TEXT_EXPERTS)
    waiting = sum(span.done.queue_s_total / span.seconds for span in spans)
    dispatches = sum(span.done.dispatches_total for span in spans)
    coming = _coming(moment).tokens * (moment.text_token_s or 0.0)
    # Waiting beside idle servers is a matter of the machine, not of their number.
    if not dispatches or busy < config.down * replicas:
        return Demand(replicas=max(busy, coming))
    wait_s = sum(span.done.queue_s_total for span in spans) / dispatches
    return Demand(replicas=max(busy + waiting, coming), strain=wait_s / config.target_s)


def _decoder(moment: Moment, config: PoolConfig, replicas: int) -> Demand:
    loads = [load for load in moment.of(DecoderLoad) if load.kv_tokens_capacity]
    if not loads:
        return Demand(replicas=0.0)
    capacity = sum(load.kv_tokens_capacity for load in loads) / len(loads)
    used = sum(load.kv_tokens_used for load in loads)
    running = sum(load.running_requests for load in loads)
    # Those that wait for an expert pool would wait on any decoder.
    waiting = sum(
        max(0, d.waiting_requests - d.waiting_text_pool - d.waiting_vision_pool) for d in loads
    )
    each = used / running if running else 0.0
    places = sum(load.max_running_requests for load in loads) / len(loads)
    share = max(each / capacity, 1 / places if places else 0.0)
    spans = [span.done for span in moment.done(DecoderLoad)]
    steps = sum(done.steps_total for done in spans)
    step_s = sum(done.step_s_total for done in spans) / steps if steps else 0.0
    return Demand(
        replicas=max(
            (used + waiting * each) / capacity,
            (running + waiting) / places if places else 0.0,
            _coming(moment).held_s * share,
        ),
        strain=step_s / config.target_s if running > replicas else 0.0,
    )


def _busy(moment: Moment, pool: Pool) -> float:
    """Seconds of compute in a second, over all servers of a pool."""
    return sum(span.done.compute_s_total / span.seconds for span in moment.done(ExpertLoad, pool))


def _parked(moment: Moment) -> int:
    """Media items that wait in gateways, because no encoder is there."""
    return sum(load.waiting_encoder for load in moment.of(GatewayLoad))


def _arriving_patches(moment: Moment) -> float:
    """Patches that arrive in a second: admitted by encoders, or, while there are none, of the items
    that gateways take in."""
    admitted = moment.done(EncoderLoad)
    arriving = sum(span.done.admitted_patches_total / span.seconds for span in admitted)
    if _parked(moment) and moment.item_patches is not None:
        items = moment.done(GatewayLoad)
        per_s = sum(span.done.media_items_total / span.seconds for span in items)
        arriving += per_s * moment.item_patches
    return arriving


def _coming(moment: Moment) -> Cost:
    """What the answers that are asked for in a second will take, one second's worth.

    The gateways see a burst before it has passed encoders and vision experts. Where one kind of
    answer has not been measured yet, the other stands in.
    """
    held_s = tokens = 0.0
    plain, media = moment.plain_cost, moment.media_cost
    for span in moment.done(GatewayLoad):
        asked = span.done
        for count, cost in (
            (asked.plain_answers_total, plain or media),
            (asked.media_answers_total, media or plain),
        ):
            if cost is not None:
                held_s += count / span.seconds * cost.held_s
                tokens += count / span.seconds * cost.tokens
    return Cost(held_s=held_s, tokens=tokens)


_DEMANDS = {
    Pool.ENCODER: _encoder,
    Pool.DECODER: _decoder,
    Pool.TEXT_EXPERTS: _text_experts,
    Pool.VISION_EXPERTS: _vision_experts,
}
