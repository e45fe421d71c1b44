"""A conversation to a prompt's pieces, by the chat template of ERNIE-4.5-VL-28B-A3B-PT. No torch.

    <|begin_of_sentence|>[system\\n]User: ...\\nAssistant: ...<|end_of_sentence|>User: ...
    \\nAssistant: <think>\\n\\n</think>\\n\\n

The last line is the generation prompt; with thinking asked for it ends at `<think>`. Media stand
in the text as `Picture n:` or `Video n:` and their delimited placeholder, numbered over the whole
chat.

Control tokens come from the template alone. Everything between two of them, the template's text and
the user's, is tokenised as one string, because merges cross their border.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chiasm.model.config import ModelConfig
from chiasm.model.tokenizer import Tokenizer
from chiasm.types import MediaKind

_BEGIN, _END = "<|begin_of_sentence|>", "<|end_of_sentence|>"
_THINK, _THINK_END = "<think>", "</think>"
_MEDIA_NAME = {MediaKind.IMAGE: "Picture", MediaKind.VIDEO: "Video"}


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of a message."""

    text: str


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A media item of a message; `index` counts the request's media."""

    kind: MediaKind
    index: int


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn."""

    role: str
    parts: tuple[TextPart | MediaPart, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A run of token ids."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placeholder:
    """Where the embeddings of a media item go."""

    index: int
    kind: MediaKind


@dataclass(frozen=True, slots=True)
class _Control:
    """A control token; ordinary text for a tokenizer that does not have it."""

    spelling: str


@dataclass(frozen=True, slots=True)
class _Id:
    """A token whose id the model's config states."""

    token_id: int


Piece = Tokens | Placeholder
_Element = str | _Control | _Id | Placeholder


def render_chat(
    messages: Sequence[ChatMessage],
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    enable_thinking: bool = False,
) -> tuple[Piece, ...]:
    """Pieces of the prompt, ready to be laid out.

    `messages` keep the rules of Chat in inference.proto. A last message of the assistant is left
    open, to be continued after its text.
    """
    return _tokenise(_elements(messages, config, enable_thinking), tokenizer)


def _elements(
    messages: Sequence[ChatMessage], config: ModelConfig, enable_thinking: bool
) -> Iterator[_Element]:
    counts = dict.fromkeys(MediaKind, 0)
    yield _Control(_BEGIN)
    for message in messages:
        if message.role == "assistant":
            is_open = message is messages[-1]
            yield from _answer(message, is_open=is_open)
            if not is_open:
                yield _Control(_END)
            continue
        if message.role == "user":
            yield "User: "
        for part in message.parts:
            if isinstance(part, TextPart):
                yield part.text
            else:
                counts[part.kind] += 1
                yield from _media(part, counts[part.kind], config)
        if message.role == "system":
            yield "\n"
    if messages[-1].role == "user":
        yield "\nAssistant: "
        yield _Control(_THINK)
        if not enable_thinking:
            yield "\n\n"
            yield _Control(_THINK_END)
            yield "\n\n"


def _media(part: MediaPart, number: int, config: ModelConfig) -> Iterator[_Element]:
    tokens = config.tokens
    start, end = (
        (tokens.image_start, tokens.image_end)
        if part.kind is MediaKind.IMAGE
        else (tokens.video_start, tokens.video_end)
    )
    yield f"{_MEDIA_NAME[part.kind]} {number}:"
    yield _Id(start)
    yield Placeholder(part.index, part.kind)
    yield _Id(end)


def _answer(message: ChatMessage, *, is_open: bool) -> Iterator[_Element]:
    """The assistant's text. The tags around a thought in it are the template's, not text.

    An answer to be continued may break off within its thought.
    """
    text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
    yield "\nAssistant: "
    if (split := _thought(text)) is not None:
        thought, text = split
        if thought:
            yield _Control(_THINK)
            yield f"\n{thought}\n"
            yield _Control(_THINK_END)
            yield "\n"
    elif is_open and text.startswith(_THINK):
        yield _Control(_THINK)
        text = text.removeprefix(_THINK)
    yield text


def _thought(text: str) -> tuple[str, str] | None:
    """The thought that a text begins with and the text behind it; None where it has none.

    As in the template a thought ends at </think> and need not begin with <think>, which may have
    been the prompt's. Where the template drops text, nothing is dropped here: it is part of the
    thought between further <think>, of the answer between further </think>, and text in front of
    the first <think> means that there is no thought.
    """
    before, end, after = text.partition(_THINK_END)
    before = before.strip("\n")
    if not end or (_THINK in before and not before.startswith(_THINK)):
        return None
    return before.removeprefix(_THINK).strip("\n"), after.lstrip("\n")


def _tokenise(elements: Iterator[_Element], tokenizer: Tokenizer) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    ids: list[int] = []
    text: list[str] = []

    def end_text() -> None:
        if any(text):
            ids.extend(tokenizer.encode("".join(text)))
        text.clear()

    for element in elements:
        known = (
            tokenizer.token_id(element.spelling)
            if isinstance(element, _Control)
            else element.token_id
            if isinstance(element, _Id)
            else None
        )
        if isinstance(element, Placeholder):
            end_text()
            pieces += [Tokens(tuple(ids)), element]
            ids.clear()
        elif known is not None:
            end_text()
            ids.append(known)
        elif isinstance(element, _Control):
            text.append(element.spelling)
        elif isinstance(element, str):
            text.append(element)
    end_text()
    pieces.append(Tokens(tuple(ids)))
    return tuple(pieces)
