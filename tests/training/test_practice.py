"""What is practised is true, and none of it is held out."""

from __future__ import annotations

import re
from itertools import islice

import looking
import pytest

from chiasm.training.data.names import COLOUR_NAMES, SHAPE_NAMES, Language
from chiasm.training.data.sample import Picture, Split
from chiasm.training.data.stream import Stream
from chiasm.training.data.tasks import TASKS


@pytest.mark.parametrize("seed", [0, 3])
def test_practice_shares_nothing_with_what_is_held_out(seed: int) -> None:
    words, lookup = TASKS["words"], TASKS["lookup"]
    for sample in islice(Stream({"lines": 1}, seed=seed).samples(), 60):
        shown = sample.answer.split(" ")
        assert len(shown) == 2
        assert all(words.split_of((word,)) is Split.TRAIN for word in shown)
    for sample in islice(Stream({"recall": 1}, seed=seed).samples(), 60):
        facts, asked = sample.key
        told = looking.question(sample)
        assert all(name in told for name in asked) or sample.language is Language.CHINESE
        assert len(re.findall("[.。]", sample.answer)) == len(asked)
        assert lookup.split_of(facts) is Split.TRAIN


@pytest.mark.parametrize("seed", range(4))
def test_long_answers_tell_what_is_there(seed: int) -> None:
    for sample in islice(Stream({"inventory": 1}, seed=seed).samples(), 20):
        names = sample.answer.split(", " if sample.language is Language.ENGLISH else "、")
        assert [
            name.count(COLOUR_NAMES[c].of(sample.language))
            for name, (_, c, _) in zip(names, sample.key, strict=True)
        ] == [1] * len(names)
    for sample in islice(Stream({"colours": 1}, seed=seed).samples(), 20):
        form = "The {} is {}." if sample.language is Language.ENGLISH else "{}是{}。"
        sentences = re.findall(r"[^.。]+[.。]", sample.answer)
        assert [sentence.strip() for sentence in sentences] == [
            form.format(
                SHAPE_NAMES[shape].of(sample.language), COLOUR_NAMES[colour].of(sample.language)
            )
            for shape, colour, _ in sample.key
        ]
    for sample in islice(Stream({"ranking": 1}, seed=seed).samples(), 20):
        levels = {COLOUR_NAMES[colour].of(sample.language): level for colour, level in sample.key}
        named = sample.answer.split(", " if sample.language is Language.ENGLISH else "、")
        heights = [levels[name] for name in named]
        assert heights == sorted(levels.values(), reverse=True)
    for sample in islice(Stream({"letters": 1}, seed=seed).samples(), 5):
        (picture,) = sample.media
        assert isinstance(picture, Picture)
        assert picture.pixels.shape == (56, 112, 3)
        assert len(sample.answer) == 8
