"""What a client says: parts, messages, prompts and sampling, as plain values.

[user(image("cat.jpg"), "What is this?")]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chiasm.types import MediaKind


@dataclass(frozen=True, slots=True)
class Text:
    """Text. Special tokens written out in it are ordinary text."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """An image or video: the file's bytes, or a `data:` URI that the gateway decodes."""

    kind: MediaKind
    data: bytes = b""
    uri: str = ""


Part = Text | Media


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn; `role` is "system", "user" or "assistant"."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A tokenised prompt with its media, in the order of their placeholders."""

    token_ids: Sequence[int]
    images: Sequence[Media] = ()
    videos: Sequence[Media] = ()


Prompt = str | Sequence[Message] | Tokens
"""A string is one user message."""


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that is valid under a JSON Schema, given as JSON text or as what it stands for."""

    schema: str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class JsonObject:
    """Any JSON object."""


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that matches a regular expression as a whole."""

    pattern: str


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of these texts; a single one may come bare."""

    texts: str | Sequence[str]


ResponseFormat = JsonSchema | JsonObject | Regex | OneOf
"""What form an answer must have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling and stopping, as SamplingParams of inference.proto; None leaves the default.

    stop: stop strings; a single one may come bare.
    """

    max_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: str | Sequence[str] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    thinking_budget: int | None = None
    response_format: ResponseFormat | None = None


DEFAULT_SAMPLING = Sampling()


def text(value: str) -> Text:
    """A text part."""
    return Text(value)


def image(source: str | Path | bytes) -> Media:
    """A still image from a path, a `data:` URI or bytes. Raises OSError for an unreadable file."""
    return _media(MediaKind.IMAGE, source)


def video(source: str | Path | bytes) -> Media:
    """A video from a path, a `data:` URI or bytes. Raises OSError for an unreadable file."""
    return _media(MediaKind.VIDEO, source)


def _media(kind: MediaKind, source: str | Path | bytes) -> Media:
    if isinstance(source, bytes):
        return Media(kind=kind, data=source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return Media(kind=kind, uri=source)
    return Media(kind=kind, data=Path(source).read_bytes())


def system(*parts: Part | str) -> Message:
    """The system message; only the first may be one."""
    return _message("system", parts)


def user(*parts: Part | str) -> Message:
    """A user's turn."""
    return _message("user", parts)


def assistant(*parts: Part | str) -> Message:
    """An earlier answer; as the last message, one to be continued."""
    return _message("assistant", parts)


def _message(role: str, parts: Sequence[Part | str]) -> Message:
    return Message(
        role=role, parts=tuple(Text(part) if isinstance(part, str) else part for part in parts)
    )
