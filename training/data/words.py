# ruff: noqa: RUF001 - Chinese has its own punctuation
"""Rendered words of three to five capital letters, in eight faces of four families.

Held out are words: none of them is ever shown in training, in any face. So that letters are read
and not words recognised, most of the words are made up, and the tokenizer spells capitals letter by
letter.

All faces are required: with other faces the held-out pictures would be others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import accumulate, pairwise
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from chiasm.errors import FailedPrecondition
from chiasm.training.data import probes
from chiasm.training.data.drawing import Rgb, paper, photographed
from chiasm.training.data.names import Bilingual, Phrasings
from chiasm.training.data.sample import Draft, Picture, Task

WIDTH, HEIGHT = 112, 56
_MARGIN = 4
_SIZES = (24, 34)
_FACES = (
    ("font_roboto", "Roboto"),
    ("font_roboto", "RobotoBold"),
    ("font_lato", "Lato"),
    ("font_lato", "LatoBold"),
    ("font_lato", "LatoItalic"),
    ("font_caladea", "Caladea"),
    ("font_caladea", "CaladeaBold"),
)
"""Package and name; the eighth face is Pillow's own."""

_REAL = """
ACE ACT AGE AIR ANT APE ARM ART ASH BAG BAT BED BEE BIG BOX BOY BUS CAR CAT COW CUP CUT DAY DOG
DRY EAR EAT EGG END EYE FAN FAR FIG FIX FLY FOG FOX FUN GAS HAT HEN HOT ICE INK JAM JAR JET JOY
KEY KID LAW LEG LIP LOG MAN MAP MIX MUD NET NEW NUT OAK OIL OLD OWL PAN PEN PIG POT RAT RED ROW
RUN SEA SKY SON SUN TEA TEN TOP TOY VAN WAX WEB WET YES ZOO ARCH BABY BACK BALL BANK BARN BEAR
BELL BIRD BLUE BOAT BOOK CAKE CARD CAVE CITY COAT COIN COLD CORN DARK DESK DOOR DUCK DUST EAST
FACE FARM FIRE FISH FIVE FLAG FOUR FROG GAME GATE GIFT GOLD HAND HAWK HILL HOME IRON JAZZ JUMP
KING KITE LAKE LAMP LEAF LION MILK MOON NEST NINE NOON OPEN PARK PINK QUIZ RAIN RING ROAD ROCK
ROSE SALT SAND SEED SHIP SHOE SNOW SOAP SONG STAR TAXI TENT TIME TREE TWIN VASE VIEW WALL WAVE
WEST WIND WOLF WOOD WORK YARD YEAR ZERO ZINC APPLE BEACH BREAD BRICK BROWN CHAIR CLOCK CLOUD DANCE
DREAM EAGLE EARTH EIGHT FIELD FLAME FRUIT GLASS GRAPE GREEN HEART HORSE HOUSE JUICE KNIFE LEMON
LIGHT LUNCH MAGIC METAL MONEY MOUSE MUSIC NIGHT NORTH OCEAN OLIVE ONION PAPER PEACH PIANO PLANT
QUEEN RIVER ROBOT SHEEP SMILE SNAKE SOUTH SPOON STONE STORM SUGAR TABLE TIGER TOWER TRAIN WATER
WHALE WHEEL WHITE WORLD ZEBRA
"""
WORDS = tuple(_REAL.split())
_CONSONANTS, _VOWELS = "BCDFGHJKLMNPQRSTVWXYZ", "AEIOU"
_PATTERNS = ("CVC", "VCV", "CVCV", "CVCC", "CCVC", "VCVC", "CVCVC", "CCVCV", "CVCCV")
_MADE_UP = 0.7

_PHRASINGS = Phrasings(
    en=(
        "Which word is this?",
        "What does the text say?",
        "Read the word.",
        "What is written here?",
    ),
    zh=("这是哪个单词？", "图中写着什么？", "请读出图中的单词。", "这里写的是什么？"),
)


def any_word(rng: Random) -> str:
    """A real word or a made-up one."""
    word = rng.choice(WORDS)
    if rng.random() < _MADE_UP:
        pattern = rng.choice(_PATTERNS)
        word = "".join(rng.choice(_CONSONANTS if c == "C" else _VOWELS) for c in pattern)
    return word


def _draft(rng: Random) -> Draft:
    written = write(any_word(rng), rng)
    return Draft(
        key=(written.word,),
        phrasings=_PHRASINGS,
        answer=Bilingual.same(written.word),
        draw=lambda rng: (draw(written, rng),),
        shows=shown([written]),
    )


@cache
def _font(face: int, size: int) -> ImageFont.FreeTypeFont:
    """Raises FailedPrecondition where the face's package is missing."""
    if face == len(_FACES):
        own = ImageFont.load_default(size)
        if not isinstance(own, ImageFont.FreeTypeFont):
            raise FailedPrecondition("rendered words need a Pillow with FreeType")
        return own
    package, name = _FACES[face]
    try:
        files = import_module(package).font_files
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"rendered words need {error.name}: pip install 'chiasm[train]'"
        ) from None
    return ImageFont.truetype(files[name], size)


def any_font(rng: Random) -> ImageFont.FreeTypeFont:
    """A face in the smaller half of the sizes."""
    return _font(rng.randrange(len(_FACES) + 1), rng.randint(_SIZES[0], sum(_SIZES) // 2))


class Box(NamedTuple):
    """Of a text's ink, in pixels from where it is written."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A word of a size in some face at (x, y), on WIDTH x HEIGHT."""

    word: str
    face: int
    size: int
    x: float
    y: float
    box: Box

    def letters(self) -> list[probes.At]:
        """Each letter and its middle, but for kerning."""
        ends = list(accumulate((_advance(self.face, self.size, c) for c in self.word), initial=0.0))
        scale = (self.box.right - self.box.left) / ends[-1]
        x, y = self.x + self.box.left, self.y + (self.box.top + self.box.bottom) / 2
        return [
            probes.At(letter, x + scale * (start + end) / 2, y)
            for letter, (start, end) in zip(self.word, pairwise(ends), strict=True)
        ]


@cache
def _advance(face: int, size: int, letter: str) -> float:
    return _font(face, size).getlength(letter)


def write(word: str, rng: Random) -> Written:
    """The word anywhere, of any size that there is room for."""
    face, size = rng.randrange(len(_FACES) + 1), rng.randint(*_SIZES)
    width = WIDTH - 2 * _MARGIN
    size = min(size, int(size * width / _font(face, size).getlength(word)))
    box = Box(*_font(face, size).getbbox(word))
    return Written(
        word=word,
        face=face,
        size=size,
        x=_place(WIDTH - (box.right - box.left), rng) - box.left,
        y=_place(HEIGHT - (box.bottom - box.top), rng) - box.top,
        box=box,
    )


def draw(written: Written, rng: Random) -> Picture:
    """Ink on paper, as a camera sees it."""
    sheet = Image.new("RGB", (WIDTH, HEIGHT), paper(rng))
    font = _font(written.face, written.size)
    ImageDraw.Draw(sheet).text((written.x, written.y), written.word, font=font, fill=ink(rng))
    return Picture(photographed(np.asarray(sheet), rng))


def shown(lines: Sequence[Written]) -> probes.Labels:
    """What probes can read of words, one below the other."""
    columns, rows = WIDTH // probes.CELL, HEIGHT // probes.CELL
    return {
        **probes.words([line.word for line in lines]),
        **probes.located([line.letters() for line in lines], columns, rows),
    }


def _place(room: float, rng: Random) -> float:
    """A start that leaves a margin on both sides, where there is room for one."""
    margin = min(_MARGIN, room / 2)
    return rng.uniform(margin, room - margin)


def ink(rng: Random) -> Rgb:
    """A dark colour."""
    return rng.randint(0, 90), rng.randint(0, 90), rng.randint(0, 90)


TASKS = (Task(name="words", threshold=0.90, draft=_draft),)
