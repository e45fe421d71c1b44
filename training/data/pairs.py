# ruff: noqa: RUF001 - Chinese has its own punctuation
"""Two pictures at once: are they alike, and which one shows more."""

from __future__ import annotations

from random import Random

from chiasm.training.data import probes
from chiasm.training.data.drawing import Figure, draw_figures, paper, photographed, tint
from chiasm.training.data.names import (
    COLOUR_NAMES,
    COLOURS,
    SHAPE_NAMES,
    SHAPES,
    Bilingual,
    Phrasings,
)
from chiasm.training.data.sample import Draft, Picture, Task
from chiasm.training.data.scenes import draw_cells

SIDE = 56
_MAX_COUNT = 4

_SAME = {
    "shape": Phrasings(
        en=("Do both pictures show the same shape?", "Is the shape the same in both pictures?"),
        zh=("两张图中的形状相同吗？", "这两张图片的形状一样吗？"),
    ),
    "colour": Phrasings(
        en=("Do both shapes have the same colour?", "Is the colour the same in both pictures?"),
        zh=("两张图中的颜色相同吗？", "这两张图片的颜色一样吗？"),
    ),
}
_ALIKE = Bilingual(
    "first {first}, second {second}, the same: yes", "第一张{first}，第二张{second}，一样：是"
)
_UNLIKE = Bilingual("first {first}, second {second}: no", "第一张{first}，第二张{second}：否")
_MORE = Phrasings(
    en=("Which picture has more {shape}s?", "In which picture are there more shapes?"),
    zh=("哪张图里的{shape}更多？", "哪张图片中的图形更多？"),
)
_ORDER = (Bilingual("first", "第一张"), Bilingual("second", "第二张"))


def _draw_one(shape: str, colour: str, rng: Random) -> Picture:
    size = rng.uniform(24, 34)
    x, y = (rng.uniform(size / 2, SIDE - size / 2) for _ in range(2))
    figure = Figure(shape=shape, colour=tint(colour, rng), x=x, y=y, size=size)
    return Picture(photographed(draw_figures(SIDE, SIDE, paper(rng), [figure]), rng))


def compared(first: Bilingual, second: Bilingual) -> Bilingual:
    """Both, then the verdict.

    Behind a name that is said again follows what followed it before, a comma; behind another one, a
    colon. So two are found alike as whatever stands behind a name is found (an induction head); a
    verdict after the same colon in both cases takes one more step, and was hardly ever learnt.
    """
    return (_ALIKE if first == second else _UNLIKE).filled(first=first, second=second)


def _draft_same(rng: Random) -> Draft:
    """Alike half of the time in what is asked, and, apart from that, in what is not."""
    asked = rng.choice(tuple(_SAME))
    alike = {name: rng.random() < 0.5 for name in _SAME}
    pairs = {
        name: [rng.choice(kinds)] * 2 if alike[name] else rng.sample(kinds, 2)
        for name, kinds in (("shape", SHAPES), ("colour", tuple(COLOURS)))
    }
    names = SHAPE_NAMES if asked == "shape" else COLOUR_NAMES
    first, second = (names[kind] for kind in pairs[asked])
    shown = tuple(zip(pairs["shape"], pairs["colour"], strict=True))
    return Draft(
        key=(asked, shown),
        phrasings=_SAME[asked],
        answer=compared(first, second),
        draw=lambda rng: tuple(_draw_one(shape, colour, rng) for shape, colour in shown),
        shows=probes.figures(shown),
    )


def _draft_more(rng: Random) -> Draft:
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    counts = rng.sample(range(1, _MAX_COUNT + 1), 2)
    cells = tuple(tuple(sorted(rng.sample(range(4), count))) for count in counts)

    def draw(rng: Random) -> tuple[Picture, ...]:
        scenes = ([(shape, colour, cell) for cell in group] for group in cells)
        return tuple(draw_cells(placed, rng, columns=2, rows=2) for placed in scenes)

    return Draft(
        key=(shape, colour, cells),
        phrasings=_MORE,
        answer=_ORDER[counts.index(max(counts))],
        fields={"shape": SHAPE_NAMES[shape]},
        draw=draw,
        shows=probes.cells(
            [
                (shape, colour, 4 * which + cell)
                for which, group in enumerate(cells)
                for cell in group
            ],
            2,
            2,
            num_pictures=2,
        ),
    )


TASKS = (
    Task(name="same", threshold=0.95, draft=_draft_same),
    Task(name="more", threshold=0.95, draft=_draft_more),
)
