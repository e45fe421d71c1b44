"""Content from seeds: token ids, words and JPEG files."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from chiasm.bench.workload import Passage, Picture

_THUMBNAIL = 12
_JPEG_QUALITY = 85

# Short and frequent: large vocabularies hold each of them, with its space, as one token.
_COMMON = """\
the of and to in is that for it as was with be by on not he his but at are this have from or had an
they which one you were all her she there would their we him been has when who will no more if out
so up said what its about than into them can only other time new some could these two may first
then do any like my now over such our man me even most made after also did many off before must
well back through years much where your way down should because long each just state people those
too good little world very still see own work life here both between being under day get know never
used same another go come great old high while left last might part year off came right place again
small found use part house during without hand general home water number need end point night head
set few case school group water public large book line war name once light music room fire white
far open
"""
_WORDS = _COMMON.split()


def token_ids(passage: Passage, low: int, high: int) -> list[int]:
    """Uniform ids in low..high-1, one a token."""
    rng = np.random.default_rng(passage.seed)
    ids: list[int] = rng.integers(low, high, passage.num_tokens).tolist()
    return ids


def text(passage: Passage) -> str:
    """As many common English words as the passage has tokens: about a token each."""
    rng = np.random.default_rng(passage.seed)
    return " ".join(_WORDS[i] for i in rng.integers(len(_WORDS), size=passage.num_tokens))


def jpeg(picture: Picture) -> bytes:
    """A smooth random pattern as a file: unlike any other, and cheap to make."""
    rng = np.random.default_rng(picture.seed)
    pixels = rng.integers(0, 256, (_THUMBNAIL, _THUMBNAIL, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(
        (picture.width, picture.height), Image.Resampling.BICUBIC
    )
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()
