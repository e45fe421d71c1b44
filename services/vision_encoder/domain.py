"""What passes between the servicer, the engine and the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, Protocol

import torch

from chiasm.model.patches import RawPatches
from chiasm.types import Grid, MediaKind


class Plan(NamedTuple):
    """An item's grid as its header tells it."""

    grid: Grid
    is_exact: bool
    """False: the header does not tell how many frames there are, and the grid is the largest."""


class MediaModel(Protocol):
    """What the engine runs. `plan`, `preprocess` and `embed` are called on threads.

    Files are read from their beginning and left open.
    """

    def plan(self, file: BinaryIO, kind: MediaKind) -> Plan:
        """What the header alone tells. Raises InvalidArgument."""
        ...

    def embedding_bytes(self, grid: Grid) -> int:
        """Size of an item's embeddings."""
        ...

    def preprocess(
        self, file: BinaryIO, kind: MediaKind, on_frame: Callable[[], None]
    ) -> RawPatches:
        """Decodes, resizes and patches. Raises InvalidArgument, and what `on_frame` raises, which
        is called for every frame of a video."""
        ...

    def embed(self, patches: RawPatches) -> torch.Tensor:
        """Embeddings [tokens, hidden] on the CPU."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """An item whose embeddings are in the cache, and where its time went."""

    digest: str
    grid: Grid
    num_tokens: int
    cached: bool = False
    queue_ns: int = 0
    preprocess_ns: int = 0
    compute_ns: int = 0
