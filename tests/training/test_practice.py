# ruff: noqa: RUF001 - Chinese has its own punctuation
"""What is practised is true, and none of it is held out."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import looking
import pytest

from chiasm.training.data.names import COLOUR_NAMES, SHAPE_NAMES, Language
from chiasm.training.data.sample import Picture, Split
from chiasm.training.data.scenes import PLACES, SIDES
from chiasm.training.data.stream import Stream
from chiasm.training.data.tasks import TASKS


@pytest.mark.parametrize("seed", [0, 3])
def test_practice_shares_no_word_with_what_is_held_out(seed: int) -> None:
    words = TASKS["words"]
    for sample in islice(Stream({"lines": 1}, seed=seed).samples(), 60):
        shown = sample.answer.split(" ")
        assert len(shown) == 2
        assert all(words.split_of((word,)) is Split.TRAIN for word in shown)


def test_things_of_ones_own_are_compared() -> None:
    """Both stand in the answer alone, and pairs are too many to know them by heart."""
    verdicts: Counter[bool] = Counter()
    pairs, questions = set(), set()
    for sample in islice(Stream({"alike": 1}).samples(), 400):
        words = re.findall(r"first (\w+), second (\w+)|第一张(\w+)，第二张(\w+)", sample.answer)
        first, second = filter(None, words[0])
        pairs.add((first, second))
        questions.add(looking.question(sample))
        verdict = re.split(" |：", sample.answer)[-1]
        assert verdict in (("yes", "是") if first == second else ("no", "否"))
        verdicts[first == second] += 1
    assert 150 < verdicts[True] < 250
    assert len(pairs) > 200
    assert len(questions) == len(Language)


def test_tables_are_told_again_in_another_order() -> None:
    num_in_order = 0
    for sample in islice(Stream({"retold": 1}).samples(), 60):
        *told, _ = looking.question(sample).split("\n")
        assert 3 <= len(told) <= 8
        again = sample.answer.split("\n")
        assert sorted(again) == sorted(told)
        num_in_order += again == told
    assert num_in_order < 15


def test_what_is_told_of_two_shapes_decides() -> None:
    """The first shape of the key is asked for; its value stands behind its name, or is its side."""
    kinds: Counter[str] = Counter()
    for sample in islice(Stream({"told": 1}).samples(), 150):
        (shape, colour, at), (_, _, away) = sample.key
        is_english = sample.language is Language.ENGLISH
        told, _, verdict = sample.answer.rpartition(" So " if is_english else "所以")
        assert looking.question(sample).startswith(told)
        name = SHAPE_NAMES[shape].of(sample.language)
        value = verdict.rstrip(".。").replace(" ", "").removeprefix(name)
        (row, column), (other_row, other_column) = divmod(at, 3), divmod(away, 3)
        across, down = column - other_column, row - other_row
        if value == COLOUR_NAMES[colour].of(sample.language):
            kind = "colour"
        elif value == PLACES[at].of(sample.language):
            kind = "place"
        else:
            assert (down == 0) != (across == 0)
            side = SIDES[(across > 0) - (across < 0), (down > 0) - (down < 0)]
            assert value == side.of(sample.language)
            kind = "side"
        behind = PLACES[at] if kind == "side" else None
        assert re.search(f"{name} ?{behind.of(sample.language) if behind else value}", told)
        kinds[kind] += 1
    assert min(kinds[kind] for kind in ("colour", "place", "side")) > 30


@pytest.mark.parametrize("seed", range(4))
def test_long_answers_tell_what_is_there(seed: int) -> None:
    for sample in islice(Stream({"inventory": 1}, seed=seed).samples(), 20):
        names = sample.answer.split(", " if sample.language is Language.ENGLISH else "、")
        assert [
            name.count(COLOUR_NAMES[c].of(sample.language))
            for name, (_, c, _) in zip(names, sample.key, strict=True)
        ] == [1] * len(names)
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
