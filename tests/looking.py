"""Looks at pictures and reads questions without the code that made them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from chiasm.training.data.names import COLOUR_NAMES, COLOURS
from chiasm.training.data.sample import Clip, Media, Picture, Pixels, Sample

_PALE = 160
"""All channels of paper are above it in the worst light, and of no named colour in the best."""
_PAPER = 245
"""Level of paper in the best light."""


def question(sample: Sample) -> str:
    return "".join(getattr(part, "text", "") for part in sample.messages[-1].parts)


def picture(sample: Sample, index: int = 0) -> Pixels:
    item = sample.media[index]
    assert isinstance(item, Picture)
    return item.pixels


def pixels(item: Media) -> Pixels:
    """Of a picture, or of all frames of a video."""
    return item.frames if isinstance(item, Clip) else item.pixels


def ink(pixels: Pixels) -> NDArray[np.bool_]:
    """[H, W]: where there is no paper."""
    dark: NDArray[np.bool_] = pixels.min(axis=-1) < _PALE
    return dark


def blobs(pixels: Pixels) -> list[NDArray[np.bool_]]:
    """Masks [H, W] of the connected figures; diagonal neighbours are connected."""
    labels, count = ndimage.label(ink(pixels), np.ones((3, 3)))
    return [labels == number for number in range(1, count + 1)]


def colour(pixels: Pixels, mask: NDArray[np.bool_]) -> str:
    """The named colour that most of the figure's inner pixels are next to, in the best light."""
    inner = ndimage.binary_erosion(mask, iterations=2)
    around = ndimage.binary_dilation(mask, iterations=8) & ~ink(pixels)
    mean = np.median(pixels[inner if inner.any() else mask], axis=0)
    mean = mean * (_PAPER / np.median(pixels[around]))
    return min(COLOURS, key=lambda name: float(np.linalg.norm(mean - np.array(COLOURS[name]))))


def middle(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Column and row of the middle of a figure's bounding box."""
    rows, columns = np.nonzero(mask)
    return (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2


def shape(mask: NDArray[np.bool_]) -> str:
    """Told by the share of its bounding box that a figure fills, in all and by parts."""
    rows, columns = np.nonzero(mask)
    box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = box.shape
    fill = box.mean()
    corner = max(2, height // 6), max(2, width // 6)
    top = box[: corner[0], : corner[1]].mean() + box[: corner[0], -corner[1] :].mean()
    bottom = box[-corner[0] :, : corner[1]].mean() + box[-corner[0] :, -corner[1] :].mean()
    if fill > 0.86:
        return "square"
    if fill > 0.6 and box[height // 5, width // 5]:
        return "circle"
    if bottom > 0.8 > top:
        return "triangle"
    upright = np.abs(box.astype(int) - box[::-1].astype(int)).mean()
    if upright > 0.15:
        return "star"
    return "diamond" if width < 0.85 * height else "cross"


def english_colour(answer: str) -> str:
    """The key of a colour's name in either language."""
    return next(key for key, name in COLOUR_NAMES.items() if answer in (name.en, name.zh))
