"""How busy a member is, as it reports itself: plain values, without grpc or torch.

Fields named `*_total` only grow, from zero at the member's start, so that a report which is lost
loses nothing; all others are the moment's. A member that says nothing is never taken for idle.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLoad:
    """Demand that no other member has seen yet.

    waiting_encoder, waiting_decoder: media items, and requests, for which no such member is there.
    media_items_total: media items of the requests taken in.
    plain_answers_total, media_answers_total: answers asked for, by requests without and with media.
    """

    waiting_encoder: int = 0
    waiting_decoder: int = 0
    media_items_total: int = 0
    plain_answers_total: int = 0
    media_answers_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLoad:
    """A vision encoder. `queued_*` count what runs too.

    busy_s_total: time that items took in the slower of their two stages, preprocessing and ViT.
    admitted_patches_total: patches of items that were queued; those found in the cache are not.
    oldest_wait_s: age of the oldest item in hand.
    """

    queued_items: int = 0
    queued_patches: int = 0
    admitted_patches_total: int = 0
    encoded_patches_total: int = 0
    busy_s_total: float = 0.0
    oldest_wait_s: float = 0.0
    cache_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLoad:
    """A decoder.

    queued_vision_tokens: vision tokens of prompts in hand that are not computed yet.
    vision_tokens_total: those computed.
    waiting_text_pool, waiting_vision_pool: requests that wait because that pool is away.
    steps_total, step_s_total: engine steps, and the time in them.
    text_tokens_total: text tokens computed, of prompts and of answers.
    plain_*, media_*: answers that have ended, to prompts without and with media; the time of the
        steps they had a part in; the text tokens computed for them.
    """

    running_requests: int = 0
    max_running_requests: int = 0
    waiting_requests: int = 0
    kv_tokens_used: int = 0
    kv_tokens_capacity: int = 0
    queued_vision_tokens: int = 0
    vision_tokens_total: int = 0
    waiting_text_pool: int = 0
    waiting_vision_pool: int = 0
    steps_total: int = 0
    step_s_total: float = 0.0
    text_tokens_total: int = 0
    plain_answers_total: int = 0
    plain_held_s_total: float = 0.0
    plain_tokens_total: int = 0
    media_answers_total: int = 0
    media_held_s_total: float = 0.0
    media_tokens_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLoad:
    """Work of one shard on one server.

    tokens_total: tokens with at least one expert in the shard, over all layers.
    """

    shard: int
    tokens_total: int
    compute_s_total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """An expert server; `shards` ascending, those that had work."""

    queued_dispatches: int = 0
    dispatches_total: int = 0
    queue_s_total: float = 0.0
    compute_s_total: float = 0.0
    shards: tuple[ShardLoad, ...] = ()


Load = GatewayLoad | EncoderLoad | DecoderLoad | ExpertLoad
