"""Three-axis positions of a prompt's tokens. No torch.

A text token advances all axes by one. The tokens of a media item spread from the current position
over time, height and width, in steps of one merged block; the item then moves the current position
by its longest axis (ERNIE's original processor), or by its longest side in space (transformers:
the two differ for videos alone).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from chiasm.model.config import ModelConfig
from chiasm.model.layout import LaidOutMedia
from chiasm.types import Grid


def position_ids(
    num_tokens: int, media: Sequence[LaidOutMedia], config: ModelConfig
) -> tuple[npt.NDArray[np.int64], int]:
    """Positions [3, T] int64 with the rows T, H, W, and the position of the first generated token,
    one past the largest. `media` are in prompt order."""
    positions = np.empty((3, num_tokens), dtype=np.int64)
    done = current = 0
    for item in media:
        current = _advance_text(positions[:, done : item.offset], current)
        done = item.offset + item.num_tokens
        extent = _extent(item.grid, config)
        axes = np.indices(extent).reshape(3, -1)
        positions[:, item.offset : done] = axes + current
        spans = extent if config.video_advance == "original" else extent[1:]
        current += max(spans)
    _advance_text(positions[:, done:], current)
    return positions, int(positions.max(initial=-1)) + 1


def _advance_text(positions: npt.NDArray[np.int64], current: int) -> int:
    length: int = positions.shape[1]
    positions[:] = np.arange(current, current + length)
    return current + length


def _extent(grid: Grid, config: ModelConfig) -> tuple[int, int, int]:
    """The grid in tokens."""
    vision = config.vision
    frames = 1 if grid.t == 1 else grid.t // vision.temporal_merge_size
    return frames, grid.h // vision.spatial_merge_size, grid.w // vision.spatial_merge_size
