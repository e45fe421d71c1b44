"""The bundled model's tokenizer: the synthetic one's kind, learnt from what the tasks say.

Its merges keep apart what must carry over from one sentence to another: digits are tokens of their
own, capitals in a row are spelled letter by letter, and the names of shapes, colours, places and
people never grow together with the words around them, as Chinese text, without spaces, would have
it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

from tokenizers import Tokenizer

from chiasm.model import synth_tokenizer
from chiasm.training.data.names import COLOUR_NAMES, SHAPE_NAMES, Language
from chiasm.training.data.sample import Draft, Split
from chiasm.training.data.scenes import PLACES, SIDES
from chiasm.training.data.tasks import PRACTICE, TASKS
from chiasm.training.data.texts import NUMBERS, PEOPLE

VOCAB_SIZE = 1024
_DRAFTS_PER_TASK = 200
_NOTHING_NEW = ("recall",)
"""Tasks that say what another one says, only more of it, and would crowd out what is rarer."""
_TEMPLATE = ("User: ", "Assistant: ", "Picture ", "Video ", "\n", "\n\n")
_RARE = tuple(f" {number.en}" for number in NUMBERS)
"""Words that are to be whole although they come seldom."""
_NAMES = (*COLOUR_NAMES.values(), *SHAPE_NAMES.values(), *PEOPLE, *PLACES, *SIDES.values())
_BORDERS = re.compile(
    r"[A-Z]{2,}|[0-9]|(" + "|".join(sorted((name.zh for name in _NAMES), key=len)[::-1]) + ")"
)
"""What is spelled, and, as a group, what is kept whole."""


def train() -> Tokenizer:
    """A tokenizer of VOCAB_SIZE tokens, special ones included; the same every time."""
    num_added = len(synth_tokenizer.ADDED_SPECIALS)
    return synth_tokenizer.train(VOCAB_SIZE - num_added, corpus())


def corpus() -> Iterator[str]:
    """Text that may be merged: the template's words, questions and answers of training samples."""
    for task in (*TASKS.values(), *PRACTICE.values()):
        if task.name in _NOTHING_NEW:
            continue
        rng = Random(f"corpus/{task.name}")
        for _ in range(_DRAFTS_PER_TASK):
            draft = task.draft(rng)
            if task.split_of(draft.key) is Split.TRAIN:
                yield from (*_TEMPLATE, *_RARE)
                for text in _texts(draft):
                    yield from filter(None, _BORDERS.split(text))


def _texts(draft: Draft) -> Iterator[str]:
    for language in Language:
        words = {name: value.of(language) for name, value in draft.fields.items()}
        for template in draft.phrasings.of(language):
            yield template.format(**words)
            yield draft.answer.of(language)
