# ruff: noqa: RUF001 - Chinese has its own punctuation
"""Questions about drawn shapes: what, which colour, how many, where.

Scenes of several shapes have cells of 28 x 28 pixels, one token each, and at most one shape in a
cell. Shapes stray up to 3 pixels from the middle of their cells and never touch.

Held out are combinations of shape, colour and place: each of them is trained on, with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    listed,
)
from chiasm.training.data.sample import Draft, Picture, Task
from chiasm.training.data.texts import row

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
_WHICH_SIDE = Phrasings(
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

# Whatever is asked of one shape is told of all of them first, as they are read: the answer is then
# found in what was just said, by the shape's name.
_COLOURS_ARE = Bilingual("Colours: {rows}.", "颜色：{rows}。")
_SHAPES_LIE = Bilingual("Shapes: {rows}.", "图形：{rows}。")
_SO_IT_IS = Bilingual("{told} So {shape} {value}.", "{told}所以{shape}{value}。")

PLACES = (
    Bilingual("northwest", "左上"),
    Bilingual("north", "上方"),
    Bilingual("northeast", "右上"),
    Bilingual("west", "左侧"),
    Bilingual("centre", "中间"),
    Bilingual("east", "右侧"),
    Bilingual("southwest", "左下"),
    Bilingual("south", "下方"),
    Bilingual("southeast", "右下"),
)
"""By cell of a picture of SIDE x SIDE cells."""
SIDES = {
    (-1, 0): Bilingual("left", "左边"),
    (1, 0): Bilingual("right", "右边"),
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
            x=probes.CELL * (cell % columns + 0.5) + rng.uniform(-_STRAY, _STRAY),
            y=probes.CELL * (cell // columns + 0.5) + rng.uniform(-_STRAY, _STRAY),
            size=rng.uniform(15, 20),
        )
        for shape, colour, cell in placed
    ]
    return Picture(
        photographed(
            draw_figures(probes.CELL * columns, probes.CELL * rows, paper(rng), figures), rng
        )
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question about the first of two shapes. told: what is told of both before the answer."""

    placed: tuple[Placed, Placed]
    phrasings: Phrasings
    told: Bilingual
    value: Bilingual

    @property
    def answer(self) -> Bilingual:
        """What is told of both, and what follows for the first."""
        return _SO_IT_IS.filled(told=self.told, shape=self.fields["shape"], value=self.value)

    @property
    def fields(self) -> dict[str, Bilingual]:
        """What the phrasings stand for."""
        shape, other = (SHAPE_NAMES[name] for name, _, _ in self.placed)
        return {"shape": shape, "other": other}

    def drafted(self, *, rows: int) -> Draft:
        """The question about a picture of SIDE x `rows` cells."""
        return Draft(
            key=self.placed,
            phrasings=self.phrasings,
            answer=self.answer,
            fields=self.fields,
            draw=lambda rng: (draw_cells(self.placed, rng, rows=rows),),
            shows=probes.cells(self.placed, SIDE, rows),
        )


def told_colours(placed: Sequence[Placed]) -> Bilingual:
    """The colour of each of them, in the order of the cells."""
    rows = [row((SHAPE_NAMES[shape], COLOUR_NAMES[colour])) for shape, colour, _ in _read(placed)]
    return _COLOURS_ARE.filled(rows=listed(rows))


def told_places(placed: Sequence[Placed]) -> Bilingual:
    """Where each of them is, in the order of the cells."""
    rows = [row((SHAPE_NAMES[shape], PLACES[cell])) for shape, _, cell in _read(placed)]
    return _SHAPES_LIE.filled(rows=listed(rows))


def _read(placed: Sequence[Placed]) -> list[Placed]:
    return sorted(placed, key=lambda each: each[2])


def any_colour(rng: Random) -> Asked:
    """The colour of one of two shapes, which have two."""
    shapes, colours = rng.sample(SHAPES, 2), rng.sample(tuple(COLOURS), 2)
    one, other = zip(shapes, colours, rng.sample(range(2 * SIDE), 2), strict=True)
    return Asked(
        placed=(one, other),
        phrasings=_WHAT_COLOUR,
        told=told_colours((one, other)),
        value=COLOUR_NAMES[colours[0]],
    )


def any_place(rng: Random) -> Asked:
    """The place of one of two shapes."""
    cells = rng.sample(range(SIDE**2), 2)
    one, other = coloured(rng.sample(SHAPES, 2), cells, rng)
    return Asked(
        placed=(one, other),
        phrasings=_WHERE,
        told=told_places((one, other)),
        value=PLACES[cells[0]],
    )


def any_beside(rng: Random) -> Asked:
    """How one shape lies to another in its row or column, next to it or a cell away."""
    across, down = rng.choice(tuple(SIDES))
    line, (low, high) = rng.randrange(SIDE), sorted(rng.sample(range(SIDE), 2))
    near, far = (low, high) if across + down < 0 else (high, low)
    cells = [SIDE * line + at if across else SIDE * at + line for at in (near, far)]
    one, other = coloured(rng.sample(SHAPES, 2), cells, rng)
    return Asked(
        placed=(one, other),
        phrasings=_WHICH_SIDE,
        told=told_places((one, other)),
        value=SIDES[across, down],
    )


def coloured(shapes: Sequence[str], cells: Sequence[int], rng: Random) -> tuple[Placed, ...]:
    """Shapes in cells, of any colours."""
    return tuple(
        (shape, rng.choice(tuple(COLOURS)), cell) for shape, cell in zip(shapes, cells, strict=True)
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
        shows=probes.cells(placed, SIDE, SIDE),
    )


TASKS = tuple(
    Task(name=name, threshold=0.98, draft=draft)
    for name, draft in (
        ("shape", _draft_shape),
        ("colour", lambda rng: any_colour(rng).drafted(rows=2)),
        ("description", _draft_description),
        ("count", _draft_count),
        ("place", lambda rng: any_place(rng).drafted(rows=SIDE)),
        ("relation", lambda rng: any_beside(rng).drafted(rows=SIDE)),
    )
)
