"""Small shared vocabulary: plain values without torch or grpc."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Modality(StrEnum):
    """One of the model's two isolated expert banks."""

    TEXT = "text"
    VISION = "vision"


class MediaKind(StrEnum):
    """What a media item is."""

    IMAGE = "image"
    VIDEO = "video"


class Grid(NamedTuple):
    """Extent of a media item in ViT patches (`grid_thw`): frames, patch rows, patch columns."""

    t: int
    h: int
    w: int

    @property
    def num_patches(self) -> int:
        return self.t * self.h * self.w


TOKEN_TEXT, TOKEN_IMAGE, TOKEN_VIDEO = 0, 1, 2
"""Routing types of tokens; image and video tokens (delimiters included) use the vision bank."""


class ShardSpec(NamedTuple):
    """Shards of a pool cut into `num_shards`; written as `0,1/8`."""

    shards: tuple[int, ...]
    num_shards: int

    @classmethod
    def parse(cls, text: str) -> ShardSpec:
        """Reads `0,1/8`. Raises ValueError that says what is wrong."""
        listed, slash, total = text.partition("/")
        try:
            num_shards = int(total)
            shards = tuple(sorted({int(s) for s in listed.split(",")}))
        except ValueError:
            raise ValueError(f"{text!r} is not of the form 0,1/8") from None
        if not slash or num_shards < 1 or shards[0] < 0 or shards[-1] >= num_shards:
            raise ValueError(f"{text!r}: shards must lie in 0..{num_shards - 1}")
        return cls(shards, num_shards)

    def __str__(self) -> str:
        return f"{','.join(map(str, self.shards))}/{self.num_shards}"


def shard_experts(shard: int, num_shards: int, num_experts: int) -> range:
    """Experts of a shard: [s*E/S, (s+1)*E/S). Every expert is in exactly one shard."""
    return range(shard * num_experts // num_shards, (shard + 1) * num_experts // num_shards)
