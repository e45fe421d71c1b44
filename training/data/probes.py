"""What a linear probe can be asked to read off the embeddings of a picture or a video.

A drawing's maker knows everything that it shows, where a question asks for one thing of it. Samples
carry these labels beside question and answer; the stage that teaches the ViT to see learns from
them alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from chiasm.training.data.names import COLOURS, SHAPES

Labels = Mapping[str, tuple[int, ...]]
"""By probe: for each of its runs in order, a label per slot."""


class At(NamedTuple):
    """A letter, and where its middle is, in pixels."""

    letter: str
    x: float
    y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Reads each run of `tokens` consecutive embeddings of a sample; `slots` labels of each."""

    tokens: int
    classes: int
    slots: int = 1


CELL = 28
"""The side of what one token sees, in pixels."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORD_LETTERS = 5
CELL_LETTERS = 3
"""As many as have their middle in one cell; of a few narrow words a fourth has, and is not told."""
MAX_SIDE = 3
"""Cells in a row and in a column of what is read cell by cell."""
BARS, BAR_LEVELS = 4, 7

PROBES: Mapping[str, Probe] = MappingProxyType(
    {
        "shape": Probe(tokens=4, classes=len(SHAPES)),
        "colour": Probe(tokens=4, classes=len(COLOURS)),
        "cell_shape": Probe(tokens=1, classes=1 + len(SHAPES)),
        "cell_colour": Probe(tokens=1, classes=1 + len(COLOURS)),
        "cell_place": Probe(tokens=1, classes=MAX_SIDE, slots=2),
        "cell_letter": Probe(tokens=1, classes=len(LETTERS)),
        "letters": Probe(tokens=1, classes=1 + len(LETTERS), slots=CELL_LETTERS),
        "word": Probe(tokens=8, classes=1 + len(LETTERS), slots=WORD_LETTERS),
        "digit": Probe(tokens=4, classes=10),
        "bar_colour": Probe(tokens=6, classes=1 + len(COLOURS), slots=BARS),
        "bar_level": Probe(tokens=6, classes=1 + BAR_LEVELS, slots=BARS),
        "direction": Probe(tokens=4, classes=4),
    }
)
"""Where something may be missing, class 0 says so."""


def figures(shown: Sequence[tuple[str, str]]) -> Labels:
    """Of pictures of 4 tokens with one figure each: its shape and colour."""
    colours = tuple(COLOURS)
    return {
        "shape": tuple(SHAPES.index(shape) for shape, _ in shown),
        "colour": tuple(colours.index(colour) for _, colour in shown),
    }


def cells(
    placed: Sequence[tuple[str, str, int]], columns: int, rows: int, num_pictures: int = 1
) -> Labels:
    """Of pictures whose tokens are cells: shape, colour and cell of what is in them, and where
    every cell is, row and column. Cells are counted through all pictures."""
    num_cells, names = columns * rows * num_pictures, tuple(COLOURS)
    shapes, colours = [0] * num_cells, [0] * num_cells
    for shape, colour, cell in placed:
        shapes[cell] = 1 + SHAPES.index(shape)
        colours[cell] = 1 + names.index(colour)
    places = [where for row in range(rows) for column in range(columns) for where in (row, column)]
    return {
        "cell_shape": tuple(shapes),
        "cell_colour": tuple(colours),
        "cell_place": tuple(places * num_pictures),
    }


def letters(text: str) -> Labels:
    """Of a picture with a letter in each cell."""
    return {"cell_letter": tuple(map(LETTERS.index, text))}


def words(shown: Sequence[str]) -> Labels:
    """Of words of 8 tokens each."""
    spelt = ([1 + LETTERS.index(letter) for letter in word] for word in shown)
    return {"word": tuple(label for word in spelt for label in _filled(word, WORD_LETTERS))}


def located(pictures: Sequence[Sequence[At]], columns: int, rows: int) -> Labels:
    """Of pictures whose tokens are cells: the letters in each cell, as they follow one another."""
    cells: list[list[int]] = [[] for _ in range(len(pictures) * columns * rows)]
    for picture, letters in enumerate(pictures):
        for letter in letters:
            row, column = picture * rows + int(letter.y // CELL), int(letter.x // CELL)
            cells[row * columns + column].append(1 + LETTERS.index(letter.letter))
    return {
        "letters": tuple(
            label for cell in cells for label in _filled(cell[:CELL_LETTERS], CELL_LETTERS)
        )
    }


def bars(shown: Sequence[tuple[str, int]]) -> Labels:
    """Of a chart: colour and level of each bar."""
    names = tuple(COLOURS)
    return {
        "bar_colour": _filled([1 + names.index(colour) for colour, _ in shown], BARS),
        "bar_level": _filled([level for _, level in shown], BARS),
    }


def _filled(labels: Sequence[int], length: int) -> tuple[int, ...]:
    return (*labels, *[0] * (length - len(labels)))
