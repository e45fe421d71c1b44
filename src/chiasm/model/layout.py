"""Prompts laid out: placeholders expanded, every token given its routing type. No torch.

A token's type is decided here once and travels with it: image and video placeholders and the start
and end delimiters of media use the vision bank, as in ERNIE's original processor.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from chiasm.errors import InvalidArgument
from chiasm.model.chat import Piece, Tokens
from chiasm.model.config import ModelConfig, TokenIds
from chiasm.model.geometry import num_tokens
from chiasm.types import TOKEN_IMAGE, TOKEN_TEXT, TOKEN_VIDEO, Grid, MediaKind

_FIELD = "tokens.token_ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaidOutMedia:
    """A media item and the placeholders it fills: `num_tokens` from `offset` on.

    `index` counts the request's media: those of a chat in order, those of a tokenised prompt
    images first, then videos.
    """

    kind: MediaKind
    grid: Grid
    offset: int
    num_tokens: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the decoder gets. `token_types` holds one byte per token: 0 text, 1 image, 2 video."""

    token_ids: tuple[int, ...]
    token_types: bytes
    media: tuple[LaidOutMedia, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_image_tokens(self) -> int:
        """Image placeholders."""
        return self._num_of(MediaKind.IMAGE)

    @property
    def num_video_tokens(self) -> int:
        """Video placeholders."""
        return self._num_of(MediaKind.VIDEO)

    @property
    def num_text_tokens(self) -> int:
        """All others, delimiters of media included."""
        return self.num_tokens - self.num_image_tokens - self.num_video_tokens

    def _num_of(self, kind: MediaKind) -> int:
        return sum(item.num_tokens for item in self.media if item.kind is kind)


def lay_out_pieces(pieces: Sequence[Piece], grids: Sequence[Grid], config: ModelConfig) -> Prompt:
    """The prompt of a rendered chat; `grids` are those of the request's media, by index."""
    builder = _Builder(config)
    for piece in pieces:
        if isinstance(piece, Tokens):
            builder.token_ids.extend(piece.ids)
        else:
            builder.add_media(piece.kind, grids[piece.index], piece.index)
    return builder.build()


def lay_out_tokens(
    token_ids: Sequence[int],
    image_grids: Sequence[Grid],
    video_grids: Sequence[Grid],
    config: ModelConfig,
) -> Prompt:
    """The prompt of a tokenised request.

    Each item, in order of its kind, stands as one placeholder or as a run of exactly its token
    count. Items without a delimiter between them are either all expanded or all not. Within
    VIDEO_START..VIDEO_END the image placeholder stands for a video, as in the original processor;
    laid out, a video has the checkpoint's own video placeholder.

    Raises InvalidArgument("tokens.token_ids") for placeholders that do not match the media.
    """
    runs = list(_runs(token_ids, config.tokens))
    waiting = {
        MediaKind.IMAGE: iter(enumerate(image_grids)),
        MediaKind.VIDEO: iter(enumerate(video_grids, start=len(image_grids))),
    }
    shares = {
        kind: iter(_share([run.length for run in runs if run.kind is kind], grids, config, kind))
        for kind, grids in ((MediaKind.IMAGE, image_grids), (MediaKind.VIDEO, video_grids))
    }
    builder, copied = _Builder(config), 0
    for run in runs:
        builder.token_ids.extend(token_ids[copied : run.start])
        for index, grid in itertools.islice(waiting[run.kind], next(shares[run.kind])):
            builder.add_media(run.kind, grid, index)
        copied = run.start + run.length
    builder.token_ids.extend(token_ids[copied:])
    return builder.build()


class _Builder:
    """A prompt under construction; text goes straight into `token_ids`."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._media: list[LaidOutMedia] = []
        self.token_ids: list[int] = []

    def add_media(self, kind: MediaKind, grid: Grid, index: int) -> None:
        tokens = self._config.tokens
        count = num_tokens(grid, self._config.vision)
        self._media.append(
            LaidOutMedia(
                kind=kind, grid=grid, offset=len(self.token_ids), num_tokens=count, index=index
            )
        )
        placeholder = tokens.image if kind is MediaKind.IMAGE else tokens.video
        self.token_ids.extend([placeholder] * count)

    def build(self) -> Prompt:
        ids, tokens = np.asarray(self.token_ids, dtype=np.int64), self._config.tokens
        types = np.full(len(ids), TOKEN_TEXT, dtype=np.uint8)
        types[np.isin(ids, (tokens.image_start, tokens.image_end))] = TOKEN_IMAGE
        types[np.isin(ids, (tokens.video_start, tokens.video_end))] = TOKEN_VIDEO
        for item in self._media:
            of_kind = TOKEN_IMAGE if item.kind is MediaKind.IMAGE else TOKEN_VIDEO
            types[item.offset : item.offset + item.num_tokens] = of_kind
        return Prompt(
            token_ids=tuple(self.token_ids), token_types=types.tobytes(), media=tuple(self._media)
        )


class _Run(NamedTuple):
    """Consecutive placeholders of one kind."""

    kind: MediaKind
    start: int
    length: int


def _runs(token_ids: Sequence[int], tokens: TokenIds) -> Iterator[_Run]:
    start = 0
    for kind, group in itertools.groupby(_kinds(token_ids, tokens)):
        length = len(list(group))
        if kind is not None:
            yield _Run(kind, start, length)
        start += length


def _kinds(token_ids: Sequence[int], tokens: TokenIds) -> Iterator[MediaKind | None]:
    is_in_video = False
    for token_id in token_ids:
        if token_id == tokens.image:
            yield MediaKind.VIDEO if is_in_video else MediaKind.IMAGE
        elif token_id == tokens.video:
            yield MediaKind.VIDEO
        else:
            if token_id in (tokens.video_start, tokens.video_end, tokens.image_start):
                is_in_video = token_id == tokens.video_start
            yield None


def _share(
    lengths: Sequence[int], grids: Sequence[Grid], config: ModelConfig, kind: MediaKind
) -> list[int]:
    """How many items each run holds: as many as it has placeholders, or as many as add up to it.

    Both readings are followed through all runs, by the number of items used up so far.
    """
    counts = [num_tokens(grid, config.vision) for grid in grids]
    sums = list(itertools.accumulate(counts, initial=0))
    mismatch = InvalidArgument(
        _FIELD,
        f"{len(counts)} {kind} items of {counts[:8]} tokens do not match "
        f"{len(lengths)} runs of placeholders, of lengths {list(lengths[:8])}",
    )
    if len(lengths) > len(counts):
        raise mismatch
    reached: list[dict[int, int]] = [{0: 0}]
    for length in lengths:
        after: dict[int, int] = {}
        for used in reached[-1]:
            if used + length <= len(counts):
                after[used + length] = length
        for used in reached[-1]:
            end = bisect.bisect_left(sums, sums[used] + length)
            if end < len(sums) and sums[end] == sums[used] + length:
                after[end] = end - used
        reached.append(after)
    used, shares = len(counts), []
    for taken in reversed(reached[1:]):
        if used not in taken:
            raise mismatch
        shares.append(taken[used])
        used -= taken[used]
    if used:
        raise mismatch
    return shares[::-1]
