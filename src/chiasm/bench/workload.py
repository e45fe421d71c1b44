"""What is sent, as data: conversations of turns that hold seeds and sizes, not yet any content.

The shape (lengths, modality, prefix group) and the content come from two seeds: two endpoints under
comparison get the same shapes, while no run finds its content in a cache that an earlier run left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import numpy as np

from chiasm.bench.lengths import Lengths

Seed = tuple[int, ...]

_PREFIX, _PASSAGE, _PICTURE = range(3)


class Passage(NamedTuple):
    """Text of `num_tokens` tokens; the same seed is the same text."""

    seed: Seed
    num_tokens: int


class Picture(NamedTuple):
    """An image in pixels; the same seed and size are the same file."""

    seed: Seed
    width: int
    height: int


class Size(NamedTuple):
    """Extent of an image in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request: a shared prefix, then pictures, then a text of its own."""

    prefix: Passage | None = None
    pictures: tuple[Picture, ...] = ()
    passage: Passage
    max_tokens: int

    @property
    def num_text_tokens(self) -> int:
        """Text tokens of this turn."""
        return self.passage.num_tokens + (self.prefix.num_tokens if self.prefix else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns that follow each other; each one's prompt holds all before it and their answers."""

    index: int
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWorkload:
    """A synthetic mix.

    image_share: probability that a conversation has images, in its first turn.
    image_sizes: drawn from with equal chance.
    image_pool: how many different images there are; 0: every one is new.
    prefix_groups, prefix_tokens: each conversation starts with the prefix of one group; 0: none.
    """

    input_len: Lengths
    output_len: Lengths
    image_share: float = 0.0
    images_per_request: int = 1
    image_sizes: tuple[Size, ...] = (Size(448, 448),)
    image_pool: int = 0
    prefix_groups: int = 0
    prefix_tokens: int = 0
    turns: int = 1

    def conversations(self, *, shape: Seed, content: Seed) -> Iterator[Conversation]:
        """Endless; the same seeds give the same conversations."""
        rng = np.random.default_rng(shape)
        for index in count():
            yield Conversation(
                index=index,
                turns=tuple(self._turn(rng, content, index, i) for i in range(self.turns)),
            )

    def _turn(self, rng: np.random.Generator, content: Seed, index: int, turn: int) -> Turn:
        prefix: Passage | None = None
        pictures: tuple[Picture, ...] = ()
        if turn == 0:
            has_images = rng.random() < self.image_share
            group = int(rng.integers(max(self.prefix_groups, 1)))
            pictures = self._pictures(rng, content, index) if has_images else ()
            if self.prefix_groups and self.prefix_tokens:
                prefix = Passage((*content, _PREFIX, group), self.prefix_tokens)
        return Turn(
            prefix=prefix,
            pictures=pictures,
            passage=Passage((*content, _PASSAGE, index, turn), self.input_len.draw(rng)),
            max_tokens=self.output_len.draw(rng),
        )

    def _pictures(self, rng: np.random.Generator, content: Seed, index: int) -> tuple[Picture, ...]:
        def one(i: int) -> Picture:
            if not self.image_pool:
                size = self.image_sizes[int(rng.integers(len(self.image_sizes)))]
                return Picture((*content, _PICTURE, index, i), *size)
            # The pool's member decides the size: else one picture would be several files.
            member = int(rng.integers(self.image_pool))
            size = self.image_sizes[member % len(self.image_sizes)]
            return Picture((*content, _PICTURE, member), *size)

        return tuple(one(i) for i in range(self.images_per_request))


class TraceRow(NamedTuple):
    """One recorded request: seconds, tokens, and the sizes of its images."""

    timestamp: float
    prompt_tokens: int
    output_tokens: int
    images: tuple[Size, ...]


def replay(rows: Sequence[TraceRow], *, content: Seed) -> Iterator[Conversation]:
    """The recorded requests in order, with new content of the recorded sizes."""
    for index, row in enumerate(rows):
        turn = Turn(
            pictures=tuple(
                Picture((*content, _PICTURE, index, i), *size) for i, size in enumerate(row.images)
            ),
            passage=Passage((*content, _PASSAGE, index, 0), row.prompt_tokens),
            max_tokens=row.output_tokens,
        )
        yield Conversation(index=index, turns=(turn,))


def limited(conversations: Iterator[Conversation], num_requests: int) -> Iterator[Conversation]:
    """The first conversations, `num_requests` turns in all; the last may lose turns."""
    left = num_requests
    while left > 0 and (conversation := next(conversations, None)) is not None:
        kept = conversation.turns[:left]
        left -= len(kept)
        yield replace(conversation, turns=kept)
