# ruff: noqa: RUF001 - Chinese has its own punctuation
"""Handwritten digits: 1797 real scans of 8 x 8 pixels and 17 grey levels, shipped by scikit-learn.

A scan is held out or not, as it is: no turned or shifted copy of a held-out scan is ever trained
on. (The data does not tell its writers apart, so both splits may know the same hand.)
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image

from chiasm.errors import FailedPrecondition
from chiasm.training.data.drawing import paper, photographed
from chiasm.training.data.names import Bilingual, Phrasings
from chiasm.training.data.sample import Draft, Picture, Task

SIDE = 56
_GREYS = 16
_INK = 46
"""Pixels of the picture that a scan fills, give or take a tenth."""

_PHRASINGS = Phrasings(
    en=(
        "Which digit is this?",
        "What digit is written here?",
        "Read the handwritten digit.",
        "What number is in the picture?",
    ),
    zh=(
        "这是哪个数字？",
        "图中写的是什么数字？",
        "请读出这个手写数字。",
        "图片里的数字是几？",
    ),
)


@cache
def scans() -> tuple[npt.NDArray[np.uint8], tuple[int, ...]]:
    """Pictures [1797, 8, 8] of ink 0..255, and their digits. Raises FailedPrecondition where
    scikit-learn is missing."""
    try:
        found = import_module("sklearn.datasets").load_digits()
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"the handwritten digits need {error.name}: pip install 'chiasm[train]'"
        ) from None
    ink = (found.images * 255 / _GREYS).round().astype(np.uint8)
    return ink, tuple(int(digit) for digit in found.target)


def _draft(rng: Random) -> Draft:
    images, targets = scans()
    index = rng.randrange(len(targets))

    def draw(rng: Random) -> tuple[Picture]:
        ink = Image.fromarray(images[index])
        size = round(_INK * rng.uniform(0.9, 1.1))
        ink = ink.resize((size, size), Image.Resampling.BICUBIC)
        ink = ink.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
        sheet = Image.new("L", (SIDE, SIDE))
        corner = (SIDE - size) // 2
        sheet.paste(ink, (corner + rng.randint(-3, 3), corner + rng.randint(-3, 3)))
        cover = np.asarray(sheet, np.float32)[..., None] / 255
        pen = np.full(3, rng.randint(0, 60), np.float32)
        pixels = cover * pen + (1 - cover) * np.asarray(paper(rng), np.float32)
        return (Picture(photographed(pixels.astype(np.uint8), rng)),)

    answer = Bilingual.same(targets[index])
    return Draft(
        key=(index,),
        phrasings=_PHRASINGS,
        answer=answer,
        draw=draw,
        shows={"digit": (targets[index],)},
    )


TASKS = (Task(name="digits", threshold=0.97, draft=_draft),)
