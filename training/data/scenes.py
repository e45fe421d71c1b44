# ruff: noqa: RUF001 - Chinese has its own punctuation
"""Questions about drawn shapes: what, which colour, how many, where.

Scenes of several shapes have cells of 28 x 28 pixels, one token each, and at most one shape in a
cell. Shapes stray up to 3 pixels from the middle of their cells and never touch.

Held out are combinations of shape, colour and place: each of them is trained on, with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from chiasm.training.data import probes
from chiasm.training.data.drawing import Figure, Rgb, draw_figures, paper, photographed, tint
from chiasm.training.data.names import (
    COLOUR_NAMES,
    COLOURS,
    SHAPE_NAMES,
    SHAPES,
    Bilingual,
    Phrasings,
)
from chiasm.training.data.sample import Draft, Picture, Task

CELL = 28
SIDE = 3
MAX_COUNT = 5
_SIDES = {56: 2, 84: 1, 112: 1}
"""Sides of pictures of one shape, with their weights."""
_READ = 56
"""The side that the probes of one shape read."""
_PARTS = 6
"""Parts of a side, to hold out some of the places."""
_STRAY = 3

Placed = tuple[str, str, int]
"""Shape, colour and cell; cells are counted along the rows."""

_WHAT_SHAPE = Phrasings(
    en=("What shape is this?", "Which shape is in the picture?", "Name the shape."),
    zh=("这是什么形状？", "图中是什么形状？", "请说出图形的形状。"),
)
_WHAT_COLOUR = Phrasings(
    en=(
        "What colour is the {shape}?",
        "What color is the {shape}?",
        "Name the {shape}'s colour.",
    ),
    zh=("{shape}是什么颜色？", "图中的{shape}是哪种颜色？", "请说出{shape}的颜色。"),
)
_WHAT_IS_IT = Phrasings(
    en=("What is in the picture?", "Describe the picture.", "What do you see?"),
    zh=("图片里有什么？", "请描述这张图片。", "你看到了什么？"),
)
_HOW_MANY = Phrasings(
    en=("How many shapes are there?", "Count the shapes.", "How many {shape}s do you see?"),
    zh=("有几个图形？", "请数一数图形的个数。", "图中有几个{shape}？"),
)
_WHERE = Phrasings(
    en=(
        "Where is the {shape}?",
        "In which part of the picture is it, the {shape}?",
        "Find the {shape}.",
    ),
    zh=("{shape}在哪里？", "{shape}在图中的什么位置？", "请找到{shape}。"),
)
_RELATION = Phrasings(
    en=(
        "Is the {shape} left of, right of, above or below the {other}?",
        "Where is the {shape}, seen from the {other}?",
        "On which side of the {other} is the {shape}?",
    ),
    zh=(
        "{shape}在{other}的左边、右边、上面还是下面？",
        "从{other}看，{shape}在哪一边？",
        "{shape}在{other}的哪一边？",
    ),
)

# Answers are sentences that name what was asked for first: what it is like is then found by the
# word just said, where an answer of one word has to find both at once.
IS_COLOUR = Bilingual("The {shape} is {colour}.", "{shape}是{colour}。")
_IS_AT = Bilingual("The {shape} is {place}.", "{shape}在{place}。")
_IS_BESIDE = Bilingual("The {shape} is {side} the {other}.", "{shape}在{other}的{side}。")

PLACES = {
    0: Bilingual("at the top left", "左上"),
    2: Bilingual("at the top right", "右上"),
    4: Bilingual("in the centre", "中间"),
    6: Bilingual("at the bottom left", "左下"),
    8: Bilingual("at the bottom right", "右下"),
}
SIDES = {
    (-1, 0): Bilingual("left of", "左边"),
    (1, 0): Bilingual("right of", "右边"),
    (0, -1): Bilingual("above", "上面"),
    (0, 1): Bilingual("below", "下面"),
}
"""By the direction in which the shape lies, columns to the right and rows downwards."""


def draw_cells(
    placed: Sequence[Placed], rng: Random, *, columns: int = SIDE, rows: int = SIDE
) -> Picture:
    """A picture of columns x rows cells with each shape near the middle of its cell."""
    shades: dict[str, Rgb] = {colour: tint(colour, rng) for _, colour, _ in placed}
    figures = [
        Figure(
            shape=shape,
            colour=shades[colour],
            x=CELL * (cell % columns + 0.5) + rng.uniform(-_STRAY, _STRAY),
            y=CELL * (cell // columns + 0.5) + rng.uniform(-_STRAY, _STRAY),
            size=rng.uniform(15, 20),
        )
        for shape, colour, cell in placed
    ]
    return Picture(
        photographed(draw_figures(CELL * columns, CELL * rows, paper(rng), figures), rng)
    )


def _alone(shape: str, colour: str, part: int, side: int, rng: Random) -> Picture:
    """One shape of 0.4 to 0.57 of the side; `part` tells in which part of the room its middle
    is."""
    size = side * rng.uniform(0.4, 0.57)
    room = (side - size) / _PARTS
    x, y = (size / 2 + room * (i + rng.random()) for i in (part % _PARTS, part // _PARTS))
    figure = Figure(shape=shape, colour=tint(colour, rng), x=x, y=y, size=size)
    return Picture(photographed(draw_figures(side, side, paper(rng), [figure]), rng))


def _draft_alone(rng: Random, phrasings: Phrasings, form: str) -> Draft:
    """A single shape; `form` makes the answer of its words."""
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    part = rng.randrange(_PARTS**2)
    (side,) = rng.choices(tuple(_SIDES), tuple(_SIDES.values()))
    both = Bilingual(form, form.replace(" ", ""))
    answer = both.filled(shape=SHAPE_NAMES[shape], colour=COLOUR_NAMES[colour])
    return Draft(
        key=(shape, colour, part),
        phrasings=phrasings,
        answer=answer,
        draw=lambda rng: (_alone(shape, colour, part, side, rng),),
        shows=probes.figures([(shape, colour)]) if side == _READ else {},
    )


def _draft_shape(rng: Random) -> Draft:
    return _draft_alone(rng, _WHAT_SHAPE, "{shape}")


def _draft_description(rng: Random) -> Draft:
    return _draft_alone(rng, _WHAT_IS_IT, "{colour} {shape}")


def _draft_colour(rng: Random) -> Draft:
    """Two shapes side by side: the question names one, so colours must be told apart by it."""
    (shape, other), (colour, unasked) = rng.sample(SHAPES, 2), rng.sample(tuple(COLOURS), 2)
    cell, away = rng.sample(range(2 * SIDE), 2)
    placed = ((shape, colour, cell), (other, unasked, away))
    return Draft(
        key=placed,
        phrasings=_WHAT_COLOUR,
        answer=IS_COLOUR.filled(shape=SHAPE_NAMES[shape], colour=COLOUR_NAMES[colour]),
        fields={"shape": SHAPE_NAMES[shape]},
        draw=lambda rng: (draw_cells(placed, rng, rows=2),),
        shows=probes.cells(placed, 2 * SIDE),
    )


def _draft_count(rng: Random) -> Draft:
    count = rng.randint(1, MAX_COUNT)
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    cells = sorted(rng.sample(range(SIDE**2), count))
    placed = [(shape, colour, cell) for cell in cells]
    return Draft(
        key=(shape, colour, tuple(cells)),
        phrasings=_HOW_MANY,
        answer=Bilingual.same(count),
        fields={"shape": SHAPE_NAMES[shape]},
        draw=lambda rng: (draw_cells(placed, rng),),
        shows=probes.cells(placed, SIDE**2),
    )


def _draft_place(rng: Random) -> Draft:
    cell, away = rng.choice(tuple(PLACES)), rng.randrange(SIDE**2 - 1)
    away += away >= cell
    shape, other = rng.sample(SHAPES, 2)
    placed = tuple((s, rng.choice(tuple(COLOURS)), c) for s, c in ((shape, cell), (other, away)))
    return Draft(
        key=placed,
        phrasings=_WHERE,
        answer=_IS_AT.filled(shape=SHAPE_NAMES[shape], place=PLACES[cell]),
        fields={"shape": SHAPE_NAMES[shape]},
        draw=lambda rng: (draw_cells(placed, rng),),
        shows=probes.cells(placed, SIDE**2),
    )


def _draft_relation(rng: Random) -> Draft:
    """Two shapes in one row or in one column."""
    across, down = rng.choice(tuple(SIDES))
    line, (low, high) = rng.randrange(SIDE), sorted(rng.sample(range(SIDE), 2))
    near, far = (low, high) if across + down < 0 else (high, low)
    cells = [SIDE * line + at if across else SIDE * at + line for at in (near, far)]
    shapes = rng.sample(SHAPES, 2)
    placed = tuple((s, rng.choice(tuple(COLOURS)), c) for s, c in zip(shapes, cells, strict=True))
    named = {"shape": SHAPE_NAMES[shapes[0]], "other": SHAPE_NAMES[shapes[1]]}
    return Draft(
        key=placed,
        phrasings=_RELATION,
        answer=_IS_BESIDE.filled(side=SIDES[across, down], **named),
        fields=named,
        draw=lambda rng: (draw_cells(placed, rng),),
        shows=probes.cells(placed, SIDE**2),
    )


TASKS = tuple(
    Task(name=name, threshold=0.98, draft=draft)
    for name, draft in (
        ("shape", _draft_shape),
        ("colour", _draft_colour),
        ("description", _draft_description),
        ("count", _draft_count),
        ("place", _draft_place),
        ("relation", _draft_relation),
    )
)
