"""The parts of a loaded gateway, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chiasm.load import GatewayLoad
from chiasm.model.config import ModelConfig
from chiasm.model.tokenizer import Tokenizer
from chiasm.services.gateway.channels import Channels
from chiasm.services.gateway.config import GatewaySettings
from chiasm.services.gateway.decoders import Decoders
from chiasm.services.gateway.encoders import Encoders
from chiasm.services.gateway.generation import Generator
from chiasm.services.gateway.prompts import PromptBuilder
from chiasm.services.gateway.thinking import always_thinks
from chiasm.services.gateway.validate import Validator
from chiasm.transport.membership import TopologyWatcher

MAX_PEER_MESSAGE_BYTES = 64 * 1024 * 1024
"""Bound of one message to or from an encoder or decoder: chunks of uploads and of logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What a loaded gateway answers with; `load` tells what waits for others."""

    config: ModelConfig
    validator: Validator
    prompts: PromptBuilder
    generator: Generator
    load: Callable[[], GatewayLoad]


def build(
    settings: GatewaySettings,
    config: ModelConfig,
    tokenizer: Tokenizer,
    topology: TopologyWatcher,
    channels: Channels,
) -> Engine:
    """The engine for one model over the members of `topology`."""
    encoders = Encoders(
        topology,
        channels,
        park_timeout_s=settings.park_timeout_s,
        max_concurrent=settings.max_concurrent_encodes,
        retry_after_s=settings.retry_after_s,
    )
    decoders = Decoders(
        topology,
        channels,
        park_timeout_s=settings.park_timeout_s,
        retry_after_s=settings.retry_after_s,
    )
    prompts = PromptBuilder(
        config=config,
        tokenizer=tokenizer,
        encoders=encoders,
        max_media_bytes=settings.max_media_bytes,
        max_image_pixels=settings.max_image_pixels,
    )
    generator = Generator(
        model_name=settings.served_name,
        config=config,
        tokenizer=tokenizer,
        prompts=prompts,
        decoders=decoders,
        max_prompt_logits_bytes=settings.max_prompt_logits_bytes,
        retry_after_s=settings.retry_after_s,
    )
    validator = Validator(
        model_name=settings.served_name,
        vocab_size=config.text.vocab_size,
        max_context_tokens=config.text.max_position_embeddings,
        max_media_items=settings.max_media_items,
        max_request_media_bytes=settings.max_request_media_bytes,
        max_text_bytes=settings.max_text_bytes,
        always_thinks=always_thinks(settings.model),
    )

    def load() -> GatewayLoad:
        return GatewayLoad(
            waiting_encoder=encoders.waiting.count,
            waiting_decoder=decoders.waiting.count,
            media_items_total=encoders.num_items,
            plain_answers_total=generator.num_plain_answers,
            media_answers_total=generator.num_media_answers,
        )

    return Engine(
        config=config, validator=validator, prompts=prompts, generator=generator, load=load
    )
