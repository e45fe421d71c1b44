# ruff: noqa: RUF001 - Chinese has its own punctuation
"""Tiny videos of one shape that moves: which way?"""

from __future__ import annotations

from random import Random

import numpy as np

from chiasm.training.data.drawing import Figure, draw_figures, paper, photographed, tint
from chiasm.training.data.names import COLOURS, SHAPES, Bilingual, Phrasings
from chiasm.training.data.sample import Clip, Draft, Task

SIDE = 56
FPS = 4
NUM_FRAMES = (4, 6, 8)
"""Even, as frames are merged by two."""
_LANES = 8
"""Parts of the side into which the place across the way is cut, to hold some out."""

DIRECTIONS = {
    (-1, 0): Bilingual("left", "左"),
    (1, 0): Bilingual("right", "右"),
    (0, -1): Bilingual("up", "上"),
    (0, 1): Bilingual("down", "下"),
}
_PHRASINGS = Phrasings(
    en=("Which way does it move?", "In which direction is the shape moving?", "Where does it go?"),
    zh=("它往哪边移动？", "图形向哪个方向移动？", "它朝哪个方向走？"),
)


def _draft(rng: Random) -> Draft:
    direction = rng.choice(tuple(DIRECTIONS))
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    lane, num_frames = rng.randrange(_LANES), rng.choice(NUM_FRAMES)
    return Draft(
        key=(shape, colour, direction, lane),
        phrasings=_PHRASINGS,
        answer=DIRECTIONS[direction],
        draw=lambda rng: (_draw(shape, colour, direction, lane, num_frames, rng),),
        shows={"direction": (tuple(DIRECTIONS).index(direction),) * (num_frames // 2)},
    )


def _draw(
    shape: str,
    colour: str,
    direction: tuple[int, int],
    lane: int,
    num_frames: int,
    rng: Random,
) -> Clip:
    """The way is 18 to 36 pixels long and begins anywhere from where it fits."""
    size, way = rng.uniform(14, 20), rng.uniform(18, 36)
    room = SIDE - size
    across = size / 2 + room * (lane + rng.random()) / _LANES
    start = size / 2 + rng.uniform(0, room - way)
    along = start + np.linspace(0, way, num_frames)
    if sum(direction) < 0:
        along = along[::-1]
    background, shade = paper(rng), tint(colour, rng)
    frames = []
    for place in along.tolist():
        x, y = (place, across) if direction[0] else (across, place)
        figure = Figure(shape=shape, colour=shade, x=x, y=y, size=size)
        frames.append(draw_figures(SIDE, SIDE, background, [figure]))
    return Clip(photographed(np.stack(frames), rng), FPS)


TASKS = (Task(name="motion", threshold=0.95, draft=_draft),)
