# ruff: noqa: RUF001 - Chinese has its own punctuation
"""Tasks to learn from alone: long answers, so that one picture teaches many words.

A question with a one-word answer tells one thing about a picture that took a hundred times the work
to look at. These ask for everything that is there, in order, and so teach shapes, colours, letters
and heights many at a time. Words come from the training side of their own task; scenes and bars are
drawn at random, now and then such as another task holds out.
"""

from __future__ import annotations

from random import Random

import numpy as np
from PIL import Image, ImageDraw

from chiasm.training.data import bars, probes, words
from chiasm.training.data.drawing import paper, photographed
from chiasm.training.data.names import (
    COLOUR_NAMES,
    COLOURS,
    SHAPE_NAMES,
    SHAPES,
    Bilingual,
    Phrasings,
    lines,
    listed,
)
from chiasm.training.data.pairs import compared
from chiasm.training.data.sample import Draft, Picture, Split, Task
from chiasm.training.data.scenes import (
    SIDE,
    Placed,
    any_beside,
    any_colour,
    any_place,
    coloured,
    draw_cells,
    told_colours,
    told_places,
)
from chiasm.training.data.texts import NUMBERS, PEOPLE, row

_VALUES = (*COLOUR_NAMES.values(), *SHAPE_NAMES.values(), *NUMBERS)
_THINGS = (*_VALUES, *PEOPLE)

_COLUMNS, _ROWS = 3, 2
_STRAY = 4

_LIST = Phrasings(
    en=("List everything in the picture.", "Name all shapes with their colours."),
    zh=("请列出图中所有的图形。", "请说出每个图形和颜色。"),
)
_COLOURS = Phrasings(
    en=("Say which colour everything has.", "Which colour is each shape?"),
    zh=("请说出每个图形的颜色。", "每个图形各是什么颜色？"),
)
_PLACES = Phrasings(
    en=("Say where everything is.", "Where is each shape?"),
    zh=("请说出每个图形的位置。", "每个图形各在哪里？"),
)
_SPELL = Phrasings(
    en=("Read all the letters.", "Which letters are these?"),
    zh=("请读出所有字母。", "图中有哪些字母？"),
)
_LINES = Phrasings(
    en=("Read all the words.", "What do the lines say?"),
    zh=("请读出所有单词。", "每一行写着什么？"),
)
_ALIKE = Phrasings(
    en=("Think of two things. Are they alike?",),
    zh=("请想象两样东西，一样吗？",),
)
_RANKING = Phrasings(
    en=("Order the bars from the tallest to the shortest.", "Name the bars, the tallest first."),
    zh=("请从高到低说出柱子的颜色。", "柱子从高到低是哪些颜色？"),
)
_RETELL = Phrasings(
    en=("{rows}\nSay it in another order.", "{rows}\nShuffle it."),
    zh=("{rows}\n换个顺序再说一遍。", "{rows}\n请打乱顺序。"),
)


def _draft_inventory(rng: Random) -> Draft:
    """One to six shapes, row by row."""
    cells = sorted(rng.sample(range(_COLUMNS * _ROWS), rng.randint(2, _COLUMNS * _ROWS)))
    placed = tuple((rng.choice(SHAPES), rng.choice(tuple(COLOURS)), cell) for cell in cells)
    names = [
        Bilingual(
            f"{COLOUR_NAMES[colour].en} {SHAPE_NAMES[shape].en}",
            f"{COLOUR_NAMES[colour].zh}{SHAPE_NAMES[shape].zh}",
        )
        for shape, colour, _ in placed
    ]
    return Draft(
        key=placed,
        phrasings=_LIST,
        answer=listed(names),
        draw=lambda rng: (draw_cells(placed, rng, columns=_COLUMNS, rows=_ROWS),),
        shows=probes.cells(placed, _COLUMNS, _ROWS),
    )


def _draft_colours(rng: Random) -> Draft:
    """The colours of two to four shapes."""
    placed = _any_scene(rng, _COLUMNS * _ROWS)
    return Draft(
        key=placed,
        phrasings=_COLOURS,
        answer=told_colours(placed),
        draw=lambda rng: (draw_cells(placed, rng, columns=_COLUMNS, rows=_ROWS),),
        shows=probes.cells(placed, _COLUMNS, _ROWS),
    )


def _draft_places(rng: Random) -> Draft:
    """Where two to four shapes are."""
    placed = _any_scene(rng, SIDE**2)
    return Draft(
        key=placed,
        phrasings=_PLACES,
        answer=told_places(placed),
        draw=lambda rng: (draw_cells(placed, rng),),
        shows=probes.cells(placed, SIDE, SIDE),
    )


def _any_scene(rng: Random, num_cells: int) -> tuple[Placed, ...]:
    """Two to four shapes in as many cells."""
    shapes = rng.sample(SHAPES, rng.randint(2, 4))
    return coloured(shapes, rng.sample(range(num_cells), len(shapes)), rng)


def _draft_letters(rng: Random) -> Draft:
    """Two rows of four letters, each near the middle of a cell."""
    letters = "".join(rng.choice(probes.LETTERS) for _ in range(8))
    return Draft(
        key=(letters,),
        phrasings=_SPELL,
        answer=Bilingual.same(letters),
        draw=lambda rng: (_draw_letters(letters, rng),),
        shows=probes.letters(letters),
    )


def _draw_letters(letters: str, rng: Random) -> Picture:
    columns = len(letters) // 2
    sheet = Image.new("RGB", (probes.CELL * columns, probes.CELL * 2), paper(rng))
    pen, font, ink = ImageDraw.Draw(sheet), words.any_font(rng), words.ink(rng)
    for index, letter in enumerate(letters):
        x = probes.CELL * (index % columns + 0.5) + rng.uniform(-_STRAY, _STRAY)
        y = probes.CELL * (index // columns + 0.5) + rng.uniform(-_STRAY, _STRAY)
        pen.text((x, y), letter, font=font, fill=ink, anchor="mm")
    return Picture(photographed(np.asarray(sheet), rng))


def _draft_lines(rng: Random) -> Draft:
    """Two words, one below the other."""
    lines = [words.write(_trained_word(rng), rng) for _ in range(2)]
    chosen = tuple(line.word for line in lines)
    return Draft(
        key=chosen,
        phrasings=_LINES,
        answer=Bilingual.same(" ".join(chosen)),
        draw=lambda rng: (
            Picture(np.concatenate([words.draw(line, rng).pixels for line in lines])),
        ),
        shows=words.shown(lines),
    )


def _trained_word(rng: Random) -> str:
    """A word that is not held out."""
    while words.TASKS[0].split_of(((word := words.any_word(rng)),)) is not Split.TRAIN:
        pass
    return word


def _draft_ranking(rng: Random) -> Draft:
    shown = bars.any_bars(rng)
    order = sorted(shown, key=lambda bar: -bar[1])
    return Draft(
        key=shown,
        phrasings=_RANKING,
        answer=listed([COLOUR_NAMES[colour] for colour, _ in order]),
        draw=lambda rng: (bars.draw(shown, rng),),
        shows=probes.bars(shown),
    )


def _draft_alike(rng: Random) -> Draft:
    """The verdict on two things of the answer itself, alike half of the time.

    Nothing else tells it: what the question would name, the answer would have from there, and two
    that differ would be as much repeated as two that do not. And things are too many to know all
    pairs by heart.
    """
    is_alike = rng.random() < 0.5
    first, second = [rng.choice(_THINGS)] * 2 if is_alike else rng.sample(_THINGS, 2)
    return Draft(
        key=(first.en, second.en),
        phrasings=_ALIKE,
        answer=compared(first, second),
    )


def _draft_retold(rng: Random) -> Draft:
    """A table in another order: whatever stands behind a name is found again by the name."""
    letters = [Bilingual.same(letter) for letter in probes.LETTERS]
    keys = rng.sample((*letters, *PEOPLE), rng.randint(3, 8))
    rows = [row((key, rng.choice(_VALUES))) for key in keys]
    return Draft(
        key=tuple(each.en for each in rows),
        phrasings=_RETELL,
        answer=lines(rng.sample(rows, len(rows))),
        fields={"rows": lines(rows)},
    )


def _draft_told(rng: Random) -> Draft:
    """A question about two shapes that are told of and not shown."""
    asked = rng.choice((any_colour, any_place, any_beside))(rng)
    return Draft(
        key=asked.placed,
        phrasings=Phrasings(
            en=tuple("{told} " + question for question in asked.phrasings.en),
            zh=tuple("{told}" + question for question in asked.phrasings.zh),
        ),
        answer=asked.answer,
        fields={**asked.fields, "told": asked.told},
    )


TASKS = tuple(
    Task(name=name, threshold=0.9, draft=draft)
    for name, draft in (
        ("inventory", _draft_inventory),
        ("colours", _draft_colours),
        ("places", _draft_places),
        ("letters", _draft_letters),
        ("lines", _draft_lines),
        ("ranking", _draft_ranking),
        ("alike", _draft_alike),
        ("retold", _draft_retold),
        ("told", _draft_told),
    )
)
