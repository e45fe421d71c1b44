"""Shapes on small canvases.

Everything is drawn at four times the size and averaged down, so that edges are smooth; then the
picture gets what a camera does to it: uneven light and faint noise, each of them half of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from chiasm.training.data.names import COLOURS
from chiasm.training.data.sample import Pixels

Rgb = tuple[int, int, int]

SCALE = 4
_TINT = 10
_MAX_NOISE = 4.0
_MAX_SHADE = 0.2
_UNIT_SQUARE = ((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))
_ARM = 0.36


def _star() -> tuple[tuple[float, float], ...]:
    radii = (1.0, 0.45)
    angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return tuple(
        (radii[i % 2] * math.cos(a), radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)
    )


_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": tuple((0.85 * x, 0.85 * y) for x, y in _UNIT_SQUARE),
    "triangle": ((0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)),
    "diamond": ((0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)),
    "star": _star(),
    "cross": (
        *((-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM)),
        *((_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM)),
    ),
}
"""Corners within -1..1, y downwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A shape within the square of side `size` around (x, y), in pixels of the picture."""

    shape: str
    colour: Rgb
    x: float
    y: float
    size: float


def tint(colour: str, rng: Random) -> Rgb:
    """A shade of a named colour."""
    red, green, blue = (min(255, max(0, c + rng.randint(-_TINT, _TINT))) for c in COLOURS[colour])
    return red, green, blue


def paper(rng: Random) -> Rgb:
    """A light background."""
    grey = rng.randint(236, 253)
    return grey + rng.randint(-2, 2), grey + rng.randint(-2, 2), grey + rng.randint(-2, 2)


def draw_figures(width: int, height: int, background: Rgb, figures: Sequence[Figure]) -> Pixels:
    """[height, width, 3]: the figures in order, without noise."""
    canvas = Image.new("RGB", (width * SCALE, height * SCALE), background)
    pen = ImageDraw.Draw(canvas)
    for figure in figures:
        _draw(pen, figure)
    return np.asarray(canvas.reduce(SCALE))


def photographed(pixels: Pixels, rng: Random) -> Pixels:
    """[..., H, W, 3]: the same picture, or video, as a camera sees it."""
    seen = pixels.astype(np.float32)
    if rng.random() < 0.5:
        height, width = pixels.shape[-3:-1]
        seen *= _light(height, width, rng)
    if rng.random() < 0.5:
        generator = np.random.default_rng(rng.getrandbits(64))
        noise = generator.standard_normal(pixels.shape, dtype=np.float32)
        seen += noise * rng.uniform(0, _MAX_NOISE)
    return np.clip(seen, 0, 255).astype(np.uint8)


def _light(height: int, width: int, rng: Random) -> npt.NDArray[np.float32]:
    """[H, W, 1] of 1 - _MAX_SHADE to 1, falling off in some direction."""
    angle = rng.uniform(0, 2 * math.pi)
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None, None] * math.sin(angle)
    right = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None] * math.cos(angle)
    fall = (down + right) / (abs(math.sin(angle)) + abs(math.cos(angle)))  # -1 to 1
    return (1 - rng.uniform(0, _MAX_SHADE) * (1 + fall) / 2).astype(np.float32)


def _draw(pen: ImageDraw.ImageDraw, figure: Figure) -> None:
    x, y, radius = (SCALE * value for value in (figure.x, figure.y, figure.size / 2))
    if figure.shape == "circle":
        radius *= 0.92
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=figure.colour)
    else:
        corners = [(x + radius * dx, y + radius * dy) for dx, dy in _OUTLINES[figure.shape]]
        pen.polygon(corners, fill=figure.colour)
