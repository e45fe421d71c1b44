"""Messages to domain values. Every rule that needs no tokenizer is here; each names its field."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from chiasm import errors
from chiasm.services.gateway.domain import (
    Conversation,
    Generation,
    MediaSource,
    Message,
    PromptInput,
    Sampling,
    Text,
    TokenIds,
)
from chiasm.services.gateway.sampling import check_ids, sampling
from chiasm.transport.interceptors import REQUEST_ID
from chiasm.types import MediaKind
from chiasm.v1 import inference_pb2

_MAX_PARTS = 65_536
_ROLES = ("system", "user", "assistant")


class Validator:
    """The rules for one model and one set of limits. Methods raise InvalidArgument."""

    def __init__(
        self,
        *,
        model_name: str,
        vocab_size: int,
        max_context_tokens: int,
        max_media_items: int,
        max_request_media_bytes: int,
        max_text_bytes: int,
        always_thinks: bool = False,
    ) -> None:
        self._model_name = model_name
        self._vocab_size = vocab_size
        self._max_context_tokens = max_context_tokens
        self._max_media_items = max_media_items
        self._max_request_media_bytes = max_request_media_bytes
        self._max_text_bytes = max_text_bytes
        self._always_thinks = always_thinks

    def generation(self, request: inference_pb2.GenerateRequest) -> Generation:
        """A valid GenerateRequest; an empty id is replaced by a fresh one."""
        self._model(request.model)
        how = sampling(
            request.sampling,
            vocab_size=self._vocab_size,
            max_context_tokens=self._max_context_tokens,
        )
        return Generation(
            request_id=request_id(request.request_id),
            prompt=self._prompt(request),
            sampling=how,
            prompt_token_ids=request.output.prompt_token_ids,
            prompt_logits=request.output.prompt_logits,
            priority=request.priority,
            is_resumed=bool(request.received),
            received=self._received(request.received, how),
        )

    def count(self, request: inference_pb2.CountTokensRequest) -> PromptInput:
        """The prompt of a valid CountTokensRequest."""
        self._model(request.model)
        return self._prompt(request)

    def _received(
        self, received: Sequence[inference_pb2.Received], how: Sampling
    ) -> tuple[Sequence[int], ...]:
        if len(received) > how.num_choices:
            raise errors.InvalidArgument(
                "received", f"{len(received)} entries for {how.num_choices} answers"
            )
        if received and how.seed is None and how.temperature > 0:
            raise errors.InvalidArgument(
                "sampling.seed", "must be Started's when an answer is to go on"
            )
        limit = how.max_tokens or self._max_context_tokens
        for i, each in enumerate(received):
            field = f"received[{i}].token_ids"
            if len(each.token_ids) > limit:
                raise errors.InvalidArgument(field, f"{len(each.token_ids)} ids, limit {limit}")
            check_ids(field, each.token_ids, self._vocab_size)
        not_begun = ((),) * (how.num_choices - len(received))
        return (*(each.token_ids for each in received), *not_begun)

    def _model(self, name: str) -> None:
        if name and name != self._model_name:
            raise errors.InvalidArgument(
                "model", f"unknown model {name[:128]!r}; {self._model_name!r} is served here"
            )

    def _prompt(
        self, request: inference_pb2.GenerateRequest | inference_pb2.CountTokensRequest
    ) -> PromptInput:
        prompt: PromptInput
        match request.WhichOneof("input"):
            case "chat":
                prompt = self._chat(request.chat)
            case "tokens":
                prompt = self._tokens(request.tokens)
            case _:
                raise errors.InvalidArgument("input", "either chat or tokens must be set")
        self._media(prompt.media)
        return prompt

    def _chat(self, chat: inference_pb2.Chat) -> Conversation:
        if not chat.messages:
            raise errors.InvalidArgument("chat.messages", "there are no messages")
        self._bound_text(chat)
        messages = tuple(_message(m, f"chat.messages[{i}]") for i, m in enumerate(chat.messages))
        for i, message in enumerate(messages[1:], start=1):
            if message.role == "system":
                raise errors.InvalidArgument(
                    f"chat.messages[{i}].role", "a system message may only come first"
                )
        if messages[-1].role == "system":
            raise errors.InvalidArgument(
                f"chat.messages[{len(messages) - 1}].role",
                "the last message must be the user's or the assistant's",
            )
        return Conversation(
            messages=messages, enable_thinking=chat.enable_thinking or self._always_thinks
        )

    def _bound_text(self, chat: inference_pb2.Chat) -> None:
        """Bounds what will be made of the chat: its text, and its parts, however small."""
        num_bytes = num_parts = 0
        for i, message in enumerate(chat.messages):
            num_parts += max(len(message.parts), 1)
            if num_parts > _MAX_PARTS:
                raise errors.InvalidArgument(
                    f"chat.messages[{i}]", f"there are more than {_MAX_PARTS} parts in all"
                )
            for j, part in enumerate(message.parts):
                num_bytes += len(part.text.encode())
                if num_bytes > self._max_text_bytes:
                    raise errors.InvalidArgument(
                        f"chat.messages[{i}].parts[{j}].text",
                        f"the text is longer than {self._max_text_bytes} bytes in all",
                    )

    def _tokens(self, tokens: inference_pb2.TokenPrompt) -> TokenIds:
        num_ids = len(tokens.token_ids)
        if not num_ids:
            raise errors.InvalidArgument("tokens.token_ids", "there are no tokens")
        if num_ids >= self._max_context_tokens:
            raise errors.InvalidArgument(
                "tokens.token_ids",
                f"{num_ids} tokens leave no room in the context of {self._max_context_tokens}",
            )
        if len(tokens.images) + len(tokens.videos) > num_ids:
            raise errors.InvalidArgument("tokens.token_ids", "there are more media than tokens")
        check_ids("tokens.token_ids", tokens.token_ids, self._vocab_size)
        return TokenIds(
            token_ids=tuple(tokens.token_ids),
            images=tuple(
                _media(media, MediaKind.IMAGE, f"tokens.images[{i}]")
                for i, media in enumerate(tokens.images)
            ),
            videos=tuple(
                _media(media, MediaKind.VIDEO, f"tokens.videos[{i}]")
                for i, media in enumerate(tokens.videos)
            ),
        )

    def _media(self, media: tuple[MediaSource, ...]) -> None:
        if len(media) > self._max_media_items:
            raise errors.InvalidArgument(
                media[self._max_media_items].field,
                f"there are {len(media)} media items, limit {self._max_media_items}",
            )
        num_bytes = 0
        for source in media:
            # The exact size of what a URI holds is found when it is decoded; this bounds the sum.
            num_bytes += len(source.data) or len(source.uri) * 3 // 4
            if num_bytes > self._max_request_media_bytes:
                raise errors.InvalidArgument(
                    source.field,
                    f"all media are larger than {self._max_request_media_bytes} bytes",
                )


def request_id(value: str) -> str:
    """The id, or a fresh one for none."""
    if not value:
        return uuid.uuid4().hex
    if not REQUEST_ID.fullmatch(value):
        raise errors.InvalidArgument(
            "request_id", "must be at most 128 visible ASCII characters, without spaces"
        )
    return value


def _message(message: inference_pb2.Message, path: str) -> Message:
    if message.role not in _ROLES:
        raise errors.InvalidArgument(
            f"{path}.role", f"unknown role {message.role[:32]!r}; one of {', '.join(_ROLES)}"
        )
    parts = tuple(_part(part, f"{path}.parts[{i}]") for i, part in enumerate(message.parts))
    if not any(isinstance(part, MediaSource) or part.text for part in parts):
        raise errors.InvalidArgument(f"{path}.parts", "the message is empty")
    for part in parts:
        if message.role == "assistant" and isinstance(part, MediaSource):
            raise errors.InvalidArgument(part.field, "an assistant message holds only text")
    return Message(role=message.role, parts=parts)


def _part(part: inference_pb2.Part, path: str) -> Text | MediaSource:
    match part.WhichOneof("kind"):
        case "text":
            return Text(text=part.text)
        case "image":
            return _media(part.image, MediaKind.IMAGE, f"{path}.image")
        case "video":
            return _media(part.video, MediaKind.VIDEO, f"{path}.video")
    raise errors.InvalidArgument(path, "one of text, image and video must be set")


def _media(media: inference_pb2.Media, kind: MediaKind, path: str) -> MediaSource:
    if media.WhichOneof("source") is None:
        raise errors.InvalidArgument(path, "one of data and uri must be set")
    if media.WhichOneof("source") == "uri" and not media.uri:
        raise errors.InvalidArgument(f"{path}.uri", "the URI is empty")
    return MediaSource(kind=kind, field=path, data=media.data, uri=media.uri)
