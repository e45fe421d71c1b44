"""Small shared vocabulary: plain values without torch or grpc."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
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


AUTO_SHARDS = "auto"


class ShardSpec(NamedTuple):
    """Shards of a pool cut into `num_shards`; written as `0,1/8`, or `auto/8` for none of its own:
    the orchestrator assigns them at run time."""

    shards: tuple[int, ...]
    num_shards: int

    @classmethod
    def parse(cls, text: str) -> ShardSpec:
        """Reads `0,1/8` or `auto/8`. Raises ValueError that says what is wrong."""
        listed, _, total = text.partition("/")
        try:
            num_shards = int(total)
            shards = tuple(sorted({int(s) for s in listed.split(",") if listed != AUTO_SHARDS}))
        except ValueError:
            raise ValueError(f"{text!r} is neither of the form 0,1/8 nor auto/8") from None
        if num_shards < 1 or any(not 0 <= shard < num_shards for shard in shards):
            raise ValueError(f"{text!r}: shards must lie in 0..{num_shards - 1}")
        return cls(shards, num_shards)

    @property
    def is_auto(self) -> bool:
        """Whether the orchestrator assigns the shards."""
        return not self.shards

    def __str__(self) -> str:
        return f"{','.join(map(str, self.shards)) or AUTO_SHARDS}/{self.num_shards}"


def shard_experts(shard: int, num_shards: int, num_experts: int) -> range:
    """Experts of a shard: [s*E/S, (s+1)*E/S). Every expert is in exactly one shard."""
    return range(shard * num_experts // num_shards, (shard + 1) * num_experts // num_shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files of one end of a connection.

    ca: whose certificates are accepted from the other end.
    cert, key: what this end shows.
    name: the name in the other end's certificate; empty: the host it is called by.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    name: str = ""
