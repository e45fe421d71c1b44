"""Ids of the tokens that the model treats apart, found where the checkpoint states them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from chiasm.model.section import Section


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """Token ids, all below the vocabulary's size. `video` may equal `image`."""

    image: int
    image_start: int
    image_end: int
    video: int
    video_start: int
    video_end: int
    bos: int
    eos: tuple[int, ...]
    """Ids that end an answer."""
    pad: int


def read_token_ids(directory: Path, root: Section, *, vocab_size: int) -> TokenIds:
    """Looks in config.json (`root`), then among the tokenizer's added tokens, then takes the
    published id.

    `bos`, `eos` and `pad` come from generation_config.json first. A flat config names no video
    placeholder: without one in the tokenizer it is the image one, as in the original processor.
    Raises InvalidArgument for an id that cannot be found or lies outside the vocabulary.
    """
    added = _added_tokens(directory)

    def find(key: str, spelling: str, published: int) -> int:
        if root.has(key):
            return _below(vocab_size, root, key, root.integer(key, low=0))
        token_id = added.get(spelling, published)
        if not 0 <= token_id < vocab_size:
            raise root.error(key, f"is missing, and no tokenizer file gives an id of {spelling}")
        return token_id

    image_key = "im_patch_id" if root.has("im_patch_id") else "image_token_id"
    image = find(image_key, "<|IMAGE_PLACEHOLDER|>", 100295)
    spelling = "<|VIDEO_PLACEHOLDER|>"
    named = root.has("video_token_id") or root.has("text_config") or spelling in added
    video = find("video_token_id", spelling, 103367) if named else image
    sources = (
        Section.load_optional(directory / "generation_config.json"),
        root,
        root.section("text_config"),
    )
    return TokenIds(
        image=image,
        image_start=find("image_start_token_id", "<|IMAGE_START|>", 101304),
        image_end=find("image_end_token_id", "<|IMAGE_END|>", 101305),
        video=video,
        video_start=find("video_start_token_id", "<|VIDEO_START|>", 101306),
        video_end=find("video_end_token_id", "<|VIDEO_END|>", 101307),
        bos=_stated(sources, "bos_token_id", 1, vocab_size)[0],
        eos=_stated(sources, "eos_token_id", 2, vocab_size),
        pad=_stated(sources, "pad_token_id", 0, vocab_size)[0],
    )


def _stated(sources: Iterable[Section], key: str, default: int, vocab_size: int) -> tuple[int, ...]:
    for section in sources:
        if section.has(key):
            ids = section.integers(key, low=0)
            return tuple(_below(vocab_size, section, key, token_id) for token_id in ids)
    return (default,)


def _below(vocab_size: int, section: Section, key: str, token_id: int) -> int:
    if token_id >= vocab_size:
        raise section.error(key, f"{token_id} lies outside the vocabulary of {vocab_size}")
    return token_id


def _added_tokens(directory: Path) -> dict[str, int]:
    """Spelling -> id of the tokens that tokenizer files list apart from the vocabulary."""
    found = {}
    for file in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        section = Section.load_optional(directory / file)
        found.update(
            {
                spelling: token_id
                for spelling, token_id in _entries(file, section)
                if isinstance(spelling, str) and isinstance(token_id, int)
            }
        )
    return found


def _entries(file: str, section: Section) -> Iterator[tuple[object, object]]:
    """Each file has its own shape; malformed entries are left out by the caller."""
    if file == "added_tokens.json":
        yield from section.values.items()
    elif file == "tokenizer_config.json":
        for token_id, entry in section.section("added_tokens_decoder").values.items():
            if isinstance(entry, dict) and token_id.isdecimal():
                yield entry.get("content"), int(token_id)
    else:
        for entry in section.values.get("added_tokens") or ():
            if isinstance(entry, dict):
                yield entry.get("content"), entry.get("id")
