"""A validated prompt to a laid-out one: media taken in and encoded, text rendered and tokenised."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from opentelemetry import context as otel_context
from opentelemetry import trace

from chiasm import errors
from chiasm.model import chat
from chiasm.model.config import ModelConfig
from chiasm.model.layout import Prompt, lay_out_pieces, lay_out_tokens
from chiasm.model.tokenizer import Tokenizer
from chiasm.services.gateway.deadline import Deadline
from chiasm.services.gateway.domain import (
    Conversation,
    Encoded,
    MediaItem,
    Message,
    PromptInput,
    Text,
    Usage,
)
from chiasm.services.gateway.encoders import Encoders
from chiasm.services.gateway.media import take_in
from chiasm.telemetry import traces
from chiasm.types import MediaKind

Pieces = tuple[chat.Piece, ...]

_MAX_INTAKES = 4
"""Requests whose media are decoded from URIs, looked at and hashed at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaidOut:
    """A prompt the decoder can take; `items` and `encoded` are in the request's order of media."""

    prompt: Prompt
    items: tuple[MediaItem, ...]
    encoded: tuple[Encoded, ...]
    layout_ns: int
    encode_ns: int

    @property
    def usage(self) -> Usage:
        """Prompt tokens by modality."""
        prompt = self.prompt
        return Usage(
            text=prompt.num_text_tokens,
            image=prompt.num_image_tokens,
            video=prompt.num_video_tokens,
        )


class PromptBuilder:
    """Builds prompts for one model."""

    def __init__(
        self,
        *,
        config: ModelConfig,
        tokenizer: Tokenizer,
        encoders: Encoders,
        max_media_bytes: int,
        max_image_pixels: int,
    ) -> None:
        self._config, self._tokenizer, self._encoders = config, tokenizer, encoders
        self._max_media_bytes, self._max_image_pixels = max_media_bytes, max_image_pixels
        self._intake = ThreadPoolExecutor(_MAX_INTAKES, thread_name_prefix="intake")

    async def build(
        self,
        prompt: PromptInput,
        *,
        request_id: str,
        deadline: Deadline,
        context: otel_context.Context,
        must_fit: bool,
    ) -> LaidOut:
        """Encodes the media and lays the prompt out. Raises chiasm.errors with the field's path.

        must_fit: nothing is encoded for a chat whose text alone exceeds the context. Spans are
        children of `context`.
        """
        start_ns = time.monotonic_ns()
        with traces.span("layout", context=context):
            items = (
                await asyncio.get_running_loop().run_in_executor(
                    self._intake, self._take_in, prompt
                )
                if prompt.media
                else ()
            )
            pieces = (
                await asyncio.to_thread(self._render, prompt)
                if isinstance(prompt, Conversation)
                else ()
            )
        if must_fit:
            self._check_text(prompt, pieces)
        encode_start_ns = time.monotonic_ns()
        encoded = await self.encode(
            items, request_id=request_id, deadline=deadline, context=context
        )
        encode_ns = time.monotonic_ns() - encode_start_ns if items else 0
        laid_out = await asyncio.to_thread(self._lay_out, prompt, pieces, encoded)
        return LaidOut(
            prompt=laid_out,
            items=items,
            encoded=encoded,
            layout_ns=time.monotonic_ns() - start_ns - encode_ns,
            encode_ns=encode_ns,
        )

    async def encode(
        self,
        items: Sequence[MediaItem],
        *,
        request_id: str,
        deadline: Deadline,
        context: otel_context.Context,
    ) -> tuple[Encoded, ...]:
        """Embeddings of the items, in an encoder's cache when this returns."""
        with trace.use_span(trace.get_current_span(context), record_exception=False):
            return tuple(
                await self._encoders.encode(items, request_id=request_id, deadline=deadline)
            )

    def _take_in(self, prompt: PromptInput) -> tuple[MediaItem, ...]:
        return tuple(
            take_in(
                source, max_bytes=self._max_media_bytes, max_image_pixels=self._max_image_pixels
            )
            for source in prompt.media
        )

    def _check_text(self, prompt: PromptInput, pieces: Pieces) -> None:
        num_tokens = sum(len(p.ids) for p in pieces if isinstance(p, chat.Tokens))
        limit = self._config.text.max_position_embeddings
        if num_tokens >= limit:
            raise errors.InvalidArgument(
                prompt.field,
                f"the text alone has {num_tokens} tokens and leaves no room in the context of "
                f"{limit}",
            )

    def _render(self, prompt: Conversation) -> Pieces:
        return chat.render_chat(
            _numbered(prompt.messages),
            self._tokenizer,
            self._config,
            enable_thinking=prompt.enable_thinking,
        )

    def _lay_out(self, prompt: PromptInput, pieces: Pieces, encoded: Sequence[Encoded]) -> Prompt:
        if isinstance(prompt, Conversation):
            laid_out = lay_out_pieces(pieces, [item.grid for item in encoded], self._config)
        else:
            laid_out = lay_out_tokens(
                prompt.token_ids,
                [item.grid for item in encoded if item.kind is MediaKind.IMAGE],
                [item.grid for item in encoded if item.kind is MediaKind.VIDEO],
                self._config,
            )
        for media in laid_out.media:
            if media.num_tokens != encoded[media.index].num_tokens:
                raise errors.Internal(
                    f"the encoder has {encoded[media.index].num_tokens} embeddings for a grid of "
                    f"{media.num_tokens} tokens; its model is another one"
                )
        return laid_out


def _numbered(messages: Sequence[Message]) -> list[chat.ChatMessage]:
    """Messages with their media numbered over the request; empty text parts are left out."""
    numbered, index = [], 0
    for message in messages:
        parts: list[chat.TextPart | chat.MediaPart] = []
        for part in message.parts:
            if not isinstance(part, Text):
                parts.append(chat.MediaPart(part.kind, index))
                index += 1
            elif part.text:
                parts.append(chat.TextPart(part.text))
        numbered.append(chat.ChatMessage(message.role, tuple(parts)))
    return numbered
