# ruff: noqa: RUF001 - Chinese has its own punctuation
"""Tasks to learn from alone: long answers, so that one picture teaches many words.

A question with a one-word answer tells one thing about a picture that took a hundred times the work
to look at. These ask for everything that is there, in order, and so teach shapes, colours, letters
and heights many at a time. They share no sample with what is held out: words and facts come from
the training side of their own tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from chiasm.training.data import bars, probes, texts, words
from chiasm.training.data.drawing import paper, photographed
from chiasm.training.data.names import (
    COLOUR_NAMES,
    COLOURS,
    SHAPE_NAMES,
    SHAPES,
    Bilingual,
    Phrasings,
    sentences,
)
from chiasm.training.data.sample import Draft, Picture, Split, Task
from chiasm.training.data.scenes import CELL, IS_COLOUR, draw_cells

_COLUMNS, _ROWS = 3, 2
_STRAY = 4

_LIST = Phrasings(
    en=("List everything in the picture.", "Name all shapes with their colours."),
    zh=("请列出图中所有的图形。", "请说出每个图形和颜色。"),
)
_COLOURS = Phrasings(
    en=("Which colours do they have: {shapes}?",),
    zh=("{shapes}各是什么颜色？",),
)
_SPELL = Phrasings(
    en=("Read all the letters.", "Which letters are these?"),
    zh=("请读出所有字母。", "图中有哪些字母？"),
)
_LINES = Phrasings(
    en=("Read all the words.", "What do the lines say?"),
    zh=("请读出所有单词。", "每一行写着什么？"),
)
_RANKING = Phrasings(
    en=("Order the bars from the tallest to the shortest.", "Name the bars, the tallest first."),
    zh=("请从高到低说出柱子的颜色。", "柱子从高到低是哪些颜色？"),
)


def listed(items: Sequence[Bilingual]) -> Bilingual:
    """All of them, in order."""
    return Bilingual(", ".join(i.en for i in items), "、".join(i.zh for i in items))


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
        shows=probes.cells(placed, _COLUMNS * _ROWS),
    )


def _draft_colours(rng: Random) -> Draft:
    """Two to four shapes, asked for in another order."""
    shapes = rng.sample(SHAPES, rng.randint(2, 4))
    cells = rng.sample(range(_COLUMNS * _ROWS), len(shapes))
    placed = tuple(
        (shape, rng.choice(tuple(COLOURS)), cell) for shape, cell in zip(shapes, cells, strict=True)
    )
    said = [
        IS_COLOUR.filled(shape=SHAPE_NAMES[shape], colour=COLOUR_NAMES[colour])
        for shape, colour, _ in placed
    ]
    return Draft(
        key=placed,
        phrasings=_COLOURS,
        answer=sentences(said),
        fields={"shapes": listed([SHAPE_NAMES[shape] for shape in shapes])},
        draw=lambda rng: (draw_cells(placed, rng, columns=_COLUMNS, rows=_ROWS),),
        shows=probes.cells(placed, _COLUMNS * _ROWS),
    )


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
    sheet = Image.new("RGB", (CELL * columns, CELL * 2), paper(rng))
    pen, font, ink = ImageDraw.Draw(sheet), words.any_font(rng), words.ink(rng)
    for index, letter in enumerate(letters):
        x = CELL * (index % columns + 0.5) + rng.uniform(-_STRAY, _STRAY)
        y = CELL * (index // columns + 0.5) + rng.uniform(-_STRAY, _STRAY)
        pen.text((x, y), letter, font=font, fill=ink, anchor="mm")
    return Picture(photographed(np.asarray(sheet), rng))


def _draft_lines(rng: Random) -> Draft:
    """Two words, one below the other."""
    chosen = [_trained_word(rng) for _ in range(2)]
    return Draft(
        key=tuple(chosen),
        phrasings=_LINES,
        answer=Bilingual.same(" ".join(chosen)),
        draw=lambda rng: (
            Picture(np.concatenate([words.draw(word, rng).pixels for word in chosen])),
        ),
        shows=probes.words(chosen),
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


def _draft_recall(rng: Random) -> Draft:
    """All facts again, in another order."""
    while texts.LOOKUP.split_of((facts := texts.any_facts(rng)).key) is not Split.TRAIN:
        pass
    asked = rng.sample(facts.pairs, len(facts.pairs))
    return Draft(
        key=(facts.key, tuple(name.en for name, _ in asked)),
        phrasings=texts.ALL_NUMBERS if facts.is_number else texts.ALL_COLOURS,
        answer=facts.told(asked),
        fields={"facts": facts.told(facts.pairs), "names": listed([name for name, _ in asked])},
    )


TASKS = tuple(
    Task(name=name, threshold=0.9, draft=draft)
    for name, draft in (
        ("inventory", _draft_inventory),
        ("colours", _draft_colours),
        ("letters", _draft_letters),
        ("lines", _draft_lines),
        ("ranking", _draft_ranking),
        ("recall", _draft_recall),
    )
)
