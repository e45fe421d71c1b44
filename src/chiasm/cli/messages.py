"""Prompts as people write them: files, JSON conversations, token ids. Bad ones name their place."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from chiasm import errors
from chiasm.client import Media, Message, Part, Text, Tokens, image, video
from chiasm.types import MediaKind

MAX_FILE_BYTES = 256 * 1024 * 1024
"""No file beyond this is read; every gateway refuses it anyway."""

_KINDS = {
    "image": MediaKind.IMAGE,
    "image_url": MediaKind.IMAGE,
    "video": MediaKind.VIDEO,
    "video_url": MediaKind.VIDEO,
}


def read_file(path: str, *, name: str) -> bytes:
    """A file's bytes; `-` is stdin. Raises InvalidArgument if it is unreadable or too big."""
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise errors.InvalidArgument(name, f"{path!r} cannot be read: {reason}") from None
    if len(data) > MAX_FILE_BYTES:
        raise errors.InvalidArgument(name, f"{path!r} is larger than {MAX_FILE_BYTES} bytes")
    return data


def read_text(text: str, *, name: str) -> str:
    """The text itself, or what stdin holds for `-`."""
    return decoded(read_file("-", name=name), name) if text == "-" else text


def load_media(kind: MediaKind, paths: Sequence[str], *, name: str) -> list[Media]:
    """Media of files, in order."""
    return [Media(kind=kind, data=read_file(path, name=name)) for path in paths]


def load_tokens(
    path: str, *, images: Sequence[Media], videos: Sequence[Media], name: str
) -> Tokens:
    """A file with a list of token ids, bare or under the key `prompt_token_ids`."""
    value = _json(path, name)
    if isinstance(value, dict):
        value = value.get("prompt_token_ids")
    if not isinstance(value, list):
        raise errors.InvalidArgument(name, "is not a JSON list of token ids")
    return Tokens(token_ids=value, images=images, videos=videos)


def load_messages(
    path: str, *, images: Sequence[Media], videos: Sequence[Media], name: str
) -> list[Message]:
    """A conversation as OpenAI and Hugging Face write it.

    `{"type": "image"}` without a source takes the next of `images`, `video` likewise; those left
    over go before the content of the last user message.
    """
    value = _json(path, name)
    if not isinstance(value, list):
        raise errors.InvalidArgument(name, "is not a JSON list of messages")
    reader = _Reader(images, videos)
    messages = [reader.message(entry, f"messages[{i}]") for i, entry in enumerate(value)]
    left = reader.left()
    if not left:
        return messages
    last = max((i for i, m in enumerate(messages) if m.role == "user"), default=None)
    if last is None:
        raise errors.InvalidArgument(name, "has no user message to put the media in")
    messages[last] = Message(role="user", parts=(*left, *messages[last].parts))
    return messages


class _Reader:
    """Reads messages and hands out the media of the command line as they are asked for."""

    def __init__(self, images: Sequence[Media], videos: Sequence[Media]) -> None:
        self._waiting = {MediaKind.IMAGE: list(images), MediaKind.VIDEO: list(videos)}

    def left(self) -> list[Media]:
        """Media that no message asked for, images first."""
        return [media for waiting in self._waiting.values() for media in waiting]

    def message(self, entry: object, path: str) -> Message:
        if not isinstance(entry, dict) or not isinstance(entry.get("role"), str):
            raise errors.InvalidArgument(path, "is not an object with a role")
        content = entry.get("content")
        if isinstance(content, str):
            return Message(role=entry["role"], parts=(Text(content),))
        if not isinstance(content, list):
            raise errors.InvalidArgument(f"{path}.content", "is neither a string nor a list")
        parts = tuple(self._part(part, f"{path}.content[{i}]") for i, part in enumerate(content))
        return Message(role=entry["role"], parts=parts)

    def _part(self, part: object, path: str) -> Part:
        if isinstance(part, str):
            return Text(part)
        if not isinstance(part, dict):
            raise errors.InvalidArgument(path, "is not an object with a type")
        name = part.get("type")
        if name == "text":
            if not isinstance(part.get("text"), str):
                raise errors.InvalidArgument(f"{path}.text", "is not a string")
            return Text(part["text"])
        if not isinstance(name, str) or name not in _KINDS:
            raise errors.InvalidArgument(f"{path}.type", f"unknown type {name!r}")
        source = _source(part, name)
        if source is None:
            return self._next(_KINDS[name], path)
        if not isinstance(source, str):
            raise errors.InvalidArgument(f"{path}.{name}", "is not a string")
        return _media(_KINDS[name], source, f"{path}.{name}")

    def _next(self, kind: MediaKind, path: str) -> Media:
        if not self._waiting[kind]:
            raise errors.InvalidArgument(path, f"there is no --{kind} left for it")
        return self._waiting[kind].pop(0)


def _source(part: dict[str, Any], name: str) -> object:
    """The path or URI of a media part, wherever the writer has put it."""
    for key in (name, name.removesuffix("_url"), "url", "path"):
        if part.get(key) is not None:
            value = part[key]
            return value.get("url", value) if isinstance(value, dict) else value
    return None


def _media(kind: MediaKind, source: str, path: str) -> Media:
    if source[:5].lower() == "data:":
        return image(source) if kind is MediaKind.IMAGE else video(source)
    if "://" in source[:16]:
        try:
            url = urlsplit(source)
        except ValueError as error:
            raise errors.InvalidArgument(path, f"is no URL: {error}") from None
        if url.scheme not in ("file", ""):
            raise errors.InvalidArgument(
                path, f"{url.scheme}: is not fetched; give a path or a data: URI"
            )
        source = unquote(url.path) if url.scheme else source
    return Media(kind=kind, data=read_file(source, name=path))


def _json(path: str, name: str) -> object:
    try:
        value: object = json.loads(decoded(read_file(path, name=name), name))
    except (ValueError, RecursionError) as error:
        raise errors.InvalidArgument(name, f"is not JSON: {error}") from None
    return value


def decoded(data: bytes, name: str) -> str:
    """The text of UTF-8. Raises InvalidArgument that names `name`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise errors.InvalidArgument(name, f"is not UTF-8: {error}") from None
