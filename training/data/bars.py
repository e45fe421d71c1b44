# ruff: noqa: RUF001 - Chinese has its own punctuation
"""Bar charts of three or four bars, each of its own colour: which is the tallest, the shortest?"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from chiasm.training.data import probes
from chiasm.training.data.drawing import SCALE, paper, photographed, tint
from chiasm.training.data.names import COLOUR_NAMES, COLOURS, Phrasings
from chiasm.training.data.sample import Draft, Picture, Task

WIDTH, HEIGHT = 84, 56
_FLOOR = 52
"""Row of the axis."""
_STEP = 7
_LEVELS = range(1, 8)
"""Heights in steps: bars differ by a step, less what they stray."""
_STRAY = 1.5
_AXIS = (90, 90, 90)

_PHRASINGS = {
    "tallest": Phrasings(
        en=("Which bar is the tallest?", "What colour is the tallest bar?"),
        zh=("哪根柱子最高？", "最高的柱子是什么颜色？"),
    ),
    "shortest": Phrasings(
        en=("Which bar is the shortest?", "What colour is the shortest bar?"),
        zh=("哪根柱子最矮？", "最矮的柱子是什么颜色？"),
    ),
}


Bar = tuple[str, int]
"""Colour and level."""


def any_bars(rng: Random) -> tuple[Bar, ...]:
    """Three or four bars, no two alike in colour or level."""
    num_bars = rng.randint(3, 4)
    colours = rng.sample(tuple(COLOURS), num_bars)
    return tuple(zip(colours, rng.sample(_LEVELS, num_bars), strict=True))


def _draft(rng: Random) -> Draft:
    bars = any_bars(rng)
    asked = rng.choice(tuple(_PHRASINGS))
    colour, _ = (max if asked == "tallest" else min)(bars, key=lambda bar: bar[1])
    return Draft(
        key=bars,
        phrasings=_PHRASINGS[asked],
        answer=COLOUR_NAMES[colour],
        draw=lambda rng: (draw(bars, rng),),
        shows=probes.bars(bars),
    )


def draw(bars: Sequence[Bar], rng: Random) -> Picture:
    """The chart, WIDTH x HEIGHT."""
    canvas = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), paper(rng))
    pen = ImageDraw.Draw(canvas)
    room = WIDTH / len(bars)
    half = room * rng.uniform(0.28, 0.4)
    for place, (colour, level) in enumerate(bars):
        middle = room * (place + 0.5)
        top = _FLOOR - _STEP * level + rng.uniform(-_STRAY, _STRAY)
        box = (middle - half, top, middle + half, _FLOOR)
        pen.rectangle([SCALE * edge for edge in box], fill=tint(colour, rng))
    axis = (0, _FLOOR, WIDTH, _FLOOR + 1)
    pen.rectangle([SCALE * edge for edge in axis], fill=_AXIS)
    return Picture(photographed(np.asarray(canvas.reduce(SCALE)), rng))


TASKS = (Task(name="bars", threshold=0.95, draft=_draft),)
