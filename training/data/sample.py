"""One question with its media and its answer, and which of the two splits it belongs to.

A task first drafts a sample: cheap, nothing is drawn yet. The draft's key says what the sample is
about, its question left aside, and a hash of the task and the key alone decides the split. So what
a task holds out it never trains on, whatever the seed, the phrasing or the order. Another task may
draw the same scene anew, with other shades, places and noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random

import numpy as np
import numpy.typing as npt

from chiasm.model.chat import ChatMessage, MediaPart, TextPart
from chiasm.training.data.names import Bilingual, Language, Phrasings
from chiasm.training.data.probes import Labels
from chiasm.types import MediaKind

Pixels = npt.NDArray[np.uint8]
Key = tuple[object, ...]
"""Numbers, strings and tuples of them: what `repr` writes alike everywhere."""

HELD_OUT_ONE_IN = 8
_QUESTION_FIRST = 0.25
_MAX_DRAFTS = 1000
"""A draft is held out with probability 1/8: that a thousand are not has probability 1e-58."""


class Split(StrEnum):
    """Which samples: those to learn from, or those to be judged by."""

    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True, slots=True)
class Picture:
    """An image, [H, W, 3] uint8."""

    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Clip:
    """A video: frames [F, H, W, 3] uint8, and how many of them pass in a second."""

    frames: Pixels
    fps: int


Media = Picture | Clip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A conversation that ends with a question, and what the model is to say.

    shows: what its media show, for the probes that can read it.
    """

    task: str
    key: Key
    language: Language
    messages: tuple[ChatMessage, ...]
    media: tuple[Media, ...]
    shows: Labels
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A sample before its question is phrased and its media are drawn.

    fields: what the phrasings' placeholders stand for. shows: what the media will show, by probe.
    """

    key: Key
    phrasings: Phrasings
    answer: Bilingual
    fields: Mapping[str, Bilingual] = field(default_factory=dict)
    draw: Callable[[Random], tuple[Media, ...]] = lambda _: ()
    shows: Labels = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A kind of question. `threshold`: share of held-out samples that must be answered exactly."""

    name: str
    threshold: float
    draft: Callable[[Random], Draft]

    def split_of(self, key: Key) -> Split:
        """The split of all samples of this key."""
        digest = zlib.crc32(repr((self.name, key)).encode())
        return Split.TRAIN if digest % HELD_OUT_ONE_IN else Split.HELD_OUT

    def sample(self, rng: Random, split: Split) -> Sample:
        """A sample of the split; the state of `rng` decides it."""
        for _ in range(_MAX_DRAFTS):
            draft = self.draft(rng)
            if self.split_of(draft.key) is split:
                return self._finish(draft, rng)
        raise RuntimeError(f"{self.name}: no sample for {split} in {_MAX_DRAFTS} drafts")

    def _finish(self, draft: Draft, rng: Random) -> Sample:
        language = rng.choice(tuple(Language))
        template = rng.choice(draft.phrasings.of(language))
        words = {name: value.of(language) for name, value in draft.fields.items()}
        question = TextPart(template.format(**words))
        media = draft.draw(rng)
        parts: list[TextPart | MediaPart] = [
            MediaPart(MediaKind.VIDEO if isinstance(item, Clip) else MediaKind.IMAGE, index)
            for index, item in enumerate(media)
        ]
        parts.insert(0 if rng.random() < _QUESTION_FIRST else len(parts), question)
        return Sample(
            task=self.name,
            key=draft.key,
            language=language,
            messages=(ChatMessage("user", tuple(parts)),),
            media=media,
            shows=draft.shows,
            answer=draft.answer.of(language),
        )
