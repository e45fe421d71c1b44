"""How busy a member is, on the wire and back."""

from __future__ import annotations

from typing import assert_never

from chiasm.load import DecoderLoad, EncoderLoad, ExpertLoad, GatewayLoad, Load, ShardLoad
from chiasm.v1 import control_pb2, decoder_pb2, encoder_pb2, experts_pb2

_S = 1e9


def attach(load: Load, report: control_pb2.MemberReport) -> None:
    """Adds a load to a report."""
    match load:
        case GatewayLoad():
            report.gateway_load.CopyFrom(
                control_pb2.GatewayLoad(
                    waiting_encoder=load.waiting_encoder,
                    waiting_decoder=load.waiting_decoder,
                    media_items=load.media_items_total,
                    plain_answers=load.plain_answers_total,
                    media_answers=load.media_answers_total,
                )
            )
        case EncoderLoad():
            report.encoder_load.CopyFrom(encoder_to_proto(load))
        case DecoderLoad():
            report.decoder_load.CopyFrom(decoder_to_proto(load))
        case ExpertLoad():
            report.expert_load.CopyFrom(_experts_to_proto(load))
        case _:
            assert_never(load)


def detach(report: control_pb2.MemberReport) -> Load | None:
    """The load of a report; None when it has none, or one this build does not know."""
    match report.WhichOneof("load"):
        case "gateway_load":
            wire = report.gateway_load
            return GatewayLoad(
                waiting_encoder=wire.waiting_encoder,
                waiting_decoder=wire.waiting_decoder,
                media_items_total=wire.media_items,
                plain_answers_total=wire.plain_answers,
                media_answers_total=wire.media_answers,
            )
        case "encoder_load":
            return _encoder_from_proto(report.encoder_load)
        case "decoder_load":
            return _decoder_from_proto(report.decoder_load)
        case "expert_load":
            return _experts_from_proto(report.expert_load)
        case _:
            return None


def encoder_to_proto(load: EncoderLoad) -> encoder_pb2.EncoderLoad:
    """An encoder's load, as reports and GetLoad carry it."""
    return encoder_pb2.EncoderLoad(
        queued_items=load.queued_items,
        queued_patches=load.queued_patches,
        encoded_patches=load.encoded_patches_total,
        cache_bytes=load.cache_bytes,
        admitted_patches=load.admitted_patches_total,
        busy_ns=round(load.busy_s_total * _S),
        oldest_ns=round(load.oldest_wait_s * _S),
    )


def _encoder_from_proto(wire: encoder_pb2.EncoderLoad) -> EncoderLoad:
    return EncoderLoad(
        queued_items=wire.queued_items,
        queued_patches=wire.queued_patches,
        encoded_patches_total=wire.encoded_patches,
        cache_bytes=wire.cache_bytes,
        admitted_patches_total=wire.admitted_patches,
        busy_s_total=wire.busy_ns / _S,
        oldest_wait_s=wire.oldest_ns / _S,
    )


def decoder_to_proto(load: DecoderLoad) -> decoder_pb2.DecoderLoad:
    """A decoder's load, as reports and GetLoad carry it."""
    return decoder_pb2.DecoderLoad(
        running_requests=load.running_requests,
        max_running_requests=load.max_running_requests,
        waiting_requests=load.waiting_requests,
        kv_tokens_used=load.kv_tokens_used,
        kv_tokens_total=load.kv_tokens_capacity,
        queued_vision_tokens=load.queued_vision_tokens,
        vision_tokens=load.vision_tokens_total,
        waiting_text_pool=load.waiting_text_pool,
        waiting_vision_pool=load.waiting_vision_pool,
        steps=load.steps_total,
        step_ns=round(load.step_s_total * _S),
        text_tokens=load.text_tokens_total,
        plain_answers=decoder_pb2.AnswersEnded(
            answers=load.plain_answers_total,
            held_ns=round(load.plain_held_s_total * _S),
            text_tokens=load.plain_tokens_total,
        ),
        media_answers=decoder_pb2.AnswersEnded(
            answers=load.media_answers_total,
            held_ns=round(load.media_held_s_total * _S),
            text_tokens=load.media_tokens_total,
        ),
    )


def _decoder_from_proto(wire: decoder_pb2.DecoderLoad) -> DecoderLoad:
    return DecoderLoad(
        running_requests=wire.running_requests,
        max_running_requests=wire.max_running_requests,
        waiting_requests=wire.waiting_requests,
        kv_tokens_used=wire.kv_tokens_used,
        kv_tokens_capacity=wire.kv_tokens_total,
        queued_vision_tokens=wire.queued_vision_tokens,
        vision_tokens_total=wire.vision_tokens,
        waiting_text_pool=wire.waiting_text_pool,
        waiting_vision_pool=wire.waiting_vision_pool,
        steps_total=wire.steps,
        step_s_total=wire.step_ns / _S,
        text_tokens_total=wire.text_tokens,
        plain_answers_total=wire.plain_answers.answers,
        plain_held_s_total=wire.plain_answers.held_ns / _S,
        plain_tokens_total=wire.plain_answers.text_tokens,
        media_answers_total=wire.media_answers.answers,
        media_held_s_total=wire.media_answers.held_ns / _S,
        media_tokens_total=wire.media_answers.text_tokens,
    )


def _experts_to_proto(load: ExpertLoad) -> experts_pb2.ExpertLoad:
    return experts_pb2.ExpertLoad(
        queued_dispatches=load.queued_dispatches,
        dispatches=load.dispatches_total,
        queue_ns=round(load.queue_s_total * _S),
        compute_ns=round(load.compute_s_total * _S),
        shard_loads=[
            experts_pb2.ShardLoad(
                shard=s.shard, tokens=s.tokens_total, compute_ns=round(s.compute_s_total * _S)
            )
            for s in load.shards
        ],
    )


def _experts_from_proto(wire: experts_pb2.ExpertLoad) -> ExpertLoad:
    return ExpertLoad(
        queued_dispatches=wire.queued_dispatches,
        dispatches_total=wire.dispatches,
        queue_s_total=wire.queue_ns / _S,
        compute_s_total=wire.compute_ns / _S,
        shards=tuple(
            ShardLoad(shard=s.shard, tokens_total=s.tokens, compute_s_total=s.compute_ns / _S)
            for s in wire.shard_loads
        ),
    )
