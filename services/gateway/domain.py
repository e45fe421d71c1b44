"""The gateway's values: a validated request and what the services answer about its media."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chiasm.types import Grid, MediaKind


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSource:
    """A media item as the request carries it: the file, or a `data:` URI when `uri` is not empty.

    `field` is its path in the request, as `chat.messages[0].parts[1].image`.
    """

    kind: MediaKind
    field: str
    data: bytes = b""
    uri: str = ""

    @property
    def num_bytes(self) -> int:
        """What it takes as it came."""
        return len(self.data) + len(self.uri)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaItem:
    """A file whose header was looked at. `digest` is that of EncodeHeader.digest."""

    kind: MediaKind
    field: str
    data: bytes
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Where the embeddings of an item are and how many there are."""

    digest: str
    kind: MediaKind
    grid: Grid
    num_tokens: int
    encoder_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text part of a message."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    parts: tuple[Text | MediaSource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A chat to be rendered with the model's template."""

    messages: tuple[Message, ...]
    enable_thinking: bool

    @property
    def field(self) -> str:
        """Path of the prompt in the request."""
        return "chat.messages"

    @property
    def media(self) -> tuple[MediaSource, ...]:
        """All media, in prompt order."""
        return tuple(p for m in self.messages for p in m.parts if isinstance(p, MediaSource))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """A prompt that came tokenised."""

    token_ids: tuple[int, ...]
    images: tuple[MediaSource, ...]
    videos: tuple[MediaSource, ...]

    @property
    def field(self) -> str:
        """Path of the prompt in the request."""
        return "tokens.token_ids"

    @property
    def media(self) -> tuple[MediaSource, ...]:
        """Images, then videos."""
        return self.images + self.videos


PromptInput = Conversation | TokenIds


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """A form that answers must have, in llguidance's notation.

    `field` is the path in the request of what it was made from.
    """

    source: str
    field: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen and answers end.

    `max_tokens` 0: as many as fit; `seed` None: the gateway's choice. `stop` holds the stop
    strings; `include_stop`: what stops an answer is shown.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    seed: int | None
    stop: tuple[str, ...]
    include_stop: bool
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    min_tokens: int
    logprobs: int | None
    prompt_logprobs: int | None
    num_choices: int
    thinking_budget: int | None
    grammar: Grammar | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A valid GenerateRequest.

    is_resumed: the client has a part of the answers already. received: the token ids that it has of
    each.
    """

    request_id: str
    prompt: PromptInput
    sampling: Sampling
    prompt_token_ids: bool
    prompt_logits: bool
    priority: int
    is_resumed: bool
    received: tuple[Sequence[int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Prompt tokens by modality; delimiters of media count as text."""

    text: int
    image: int
    video: int

    @property
    def prompt_tokens(self) -> int:
        return self.text + self.image + self.video

    @property
    def by_modality(self) -> dict[str, int]:
        """Counts by the names telemetry uses."""
        return {"text": self.text, "image": self.image, "video": self.video}
