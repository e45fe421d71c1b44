# ruff: noqa: RUF001 - Chinese has its own punctuation
"""Every task's answers are checked against what can be seen or read, by other means."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import looking
import numpy as np
import pytest
from numpy.typing import NDArray

from chiasm.training.data import digits, words
from chiasm.training.data.names import COLOUR_NAMES, SHAPE_NAMES, Language
from chiasm.training.data.sample import Clip, Sample, Split
from chiasm.training.data.stream import Stream
from chiasm.training.data.tasks import TASKS

NUM_CHECKED = 60
NUM_COUNTED = 400

OPEN = {"words", "sums", "copy", "recall", "lookup", "description"}
"""Tasks whose answers are many."""


def drawn(task: str, count: int = NUM_CHECKED, *, seed: int = 7) -> list[Sample]:
    return list(islice(Stream({task: 1}, seed=seed).samples(), count))


def named(text: str) -> list[str]:
    """The shapes a question names, in the order in which it does."""
    found = {}
    for key, name in SHAPE_NAMES.items():
        for spelling in (name.en, name.zh):
            if spelling in text.replace("三角形", "triangle"):
                found[key] = text.replace("三角形", "triangle").index(spelling)
    return sorted(found, key=lambda key: found[key])


def test_shapes_descriptions_and_colours() -> None:
    for sample in drawn("shape"):
        (mask,) = looking.blobs(looking.picture(sample))
        assert sample.answer == SHAPE_NAMES[looking.shape(mask)].of(sample.language)
    for sample in drawn("description"):
        pixels = looking.picture(sample)
        (mask,) = looking.blobs(pixels)
        assert SHAPE_NAMES[looking.shape(mask)].of(sample.language) in sample.answer
        assert COLOUR_NAMES[looking.colour(pixels, mask)].of(sample.language) in sample.answer


def test_counts() -> None:
    for sample in drawn("count"):
        assert sample.answer == str(len(looking.blobs(looking.picture(sample))))


WHERE = (
    (("northwest", "左上"), ("north", "上方"), ("northeast", "右上")),
    (("west", "左侧"), ("centre", "中间"), ("east", "右侧")),
    (("southwest", "左下"), ("south", "下方"), ("southeast", "右下")),
)
"""Words by row and column."""


def cell(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Row and column."""
    x, y = looking.middle(mask)
    return int(y // 28), int(x // 28)


def where(sample: Sample, mask: NDArray[np.bool_]) -> str:
    row, column = cell(mask)
    return WHERE[row][column][sample.language is Language.CHINESE]


def told(sample: Sample) -> str:
    """Where each shape is, in the order of the cells."""
    masks = found(sample)
    return listed(sample, "Shapes", "图形", masks, [where(sample, mask) for mask in masks])


def coloured(sample: Sample) -> str:
    """Which colour each shape has, in the order of the cells."""
    pixels, masks = looking.picture(sample), found(sample)
    seen = [COLOUR_NAMES[looking.colour(pixels, mask)].of(sample.language) for mask in masks]
    return listed(sample, "Colours", "颜色", masks, seen)


def found(sample: Sample) -> list[NDArray[np.bool_]]:
    return sorted(looking.blobs(looking.picture(sample)), key=cell)


def listed(
    sample: Sample, english: str, chinese: str, masks: list[NDArray[np.bool_]], values: list[str]
) -> str:
    """Every shape's name with its value."""
    names = [SHAPE_NAMES[looking.shape(mask)].of(sample.language) for mask in masks]
    pairs = list(zip(names, values, strict=True))
    if sample.language is Language.CHINESE:
        return f"{chinese}：{'、'.join(map(''.join, pairs))}。"
    return f"{english}: {', '.join(map(' '.join, pairs))}."


def so(sample: Sample, shape: str, value: str) -> str:
    """The answer's end."""
    name = SHAPE_NAMES[shape].of(sample.language)
    return f"所以{name}{value}。" if sample.language is Language.CHINESE else f" So {name} {value}."


def test_colours_and_places() -> None:
    """Of all shapes, then of the one that was asked for."""
    for sample in (*drawn("colour"), *drawn("place")):
        (asked,) = named(looking.question(sample))
        (mask,) = (m for m in found(sample) if looking.shape(m) == asked)
        if sample.task == "colour":
            colour = COLOUR_NAMES[looking.colour(looking.picture(sample), mask)]
            assert sample.answer == coloured(sample) + so(sample, asked, colour.of(sample.language))
        else:
            assert sample.answer == told(sample) + so(sample, asked, where(sample, mask))


def test_colours_and_places_of_several() -> None:
    for task, tell in (("colours", coloured), ("places", told)):
        for sample in drawn(task):
            assert sample.answer == tell(sample)


def test_relations() -> None:
    for sample in drawn("relation"):
        text = looking.question(sample)
        first, second = named(text)
        if re.match(r"从|On which side of", text):  # these name the point of view first
            first, second = second, first
        at = {looking.shape(m): looking.middle(m) for m in looking.blobs(looking.picture(sample))}
        across, down = at[first][0] - at[second][0], at[first][1] - at[second][1]
        if abs(across) > abs(down):
            sides = ("left", "左边") if across < 0 else ("right", "右边")
        else:
            sides = ("above", "上面") if down < 0 else ("below", "下面")
        side = sides[sample.language is Language.CHINESE]
        assert sample.answer == told(sample) + so(sample, first, side)


def test_bars() -> None:
    for sample in drawn("bars"):
        pixels = looking.picture(sample)[:51]  # above the axis
        heights = {
            looking.colour(pixels, mask): int(np.nonzero(mask.any(axis=1))[0].min())
            for mask in looking.blobs(pixels)
        }
        is_tallest = any(word in looking.question(sample) for word in ("tallest", "最高"))
        extreme = min(heights.values()) if is_tallest else max(heights.values())
        assert heights[looking.english_colour(sample.answer)] == extreme
        assert list(heights.values()).count(extreme) == 1


VERDICTS = {
    (True, Language.ENGLISH): "first {}, second {}, the same: yes",
    (False, Language.ENGLISH): "first {}, second {}: no",
    (True, Language.CHINESE): "第一张{}，第二张{}，一样：是",
    (False, Language.CHINESE): "第一张{}，第二张{}：否",
}


def test_same_or_not() -> None:
    for sample in drawn("same"):
        seen = []
        for index in range(2):
            pixels = looking.picture(sample, index)
            (mask,) = looking.blobs(pixels)
            seen.append((looking.shape(mask), looking.colour(pixels, mask)))
        is_about_shape = any(
            w in looking.question(sample) for w in ("the same shape", "the shape", "形状")
        )
        kinds = [one[not is_about_shape] for one in seen]
        names = [({**SHAPE_NAMES, **COLOUR_NAMES})[kind].of(sample.language) for kind in kinds]
        form = VERDICTS[kinds[0] == kinds[1], sample.language]
        assert sample.answer == form.format(*names)


def test_which_has_more() -> None:
    for sample in drawn("more"):
        first, second = (len(looking.blobs(looking.picture(sample, i))) for i in range(2))
        assert first != second
        assert sample.answer in (("first", "第一张") if first > second else ("second", "第二张"))


def test_motion() -> None:
    for sample in drawn("motion"):
        (clip,) = sample.media
        assert isinstance(clip, Clip)
        ends = []
        for frame in (clip.frames[0], clip.frames[-1]):
            (mask,) = looking.blobs(frame)
            ends.append(np.array(looking.middle(mask)))
        across, down = ends[1] - ends[0]
        if abs(across) > abs(down):
            expected = ("right", "右") if across > 0 else ("left", "左")
        else:
            expected = ("down", "下") if down > 0 else ("up", "上")
        assert sample.answer in expected


def test_digits_are_the_scans_that_the_key_names() -> None:
    images, targets = digits.scans()
    assert len(images) == 1797
    for sample in drawn("digits"):
        (index,) = sample.key
        assert isinstance(index, int)
        assert sample.answer == str(targets[index])
        shrunk = 255 - looking.picture(sample)[4:52, 4:52, 0].reshape(8, 6, 8, 6).mean(axis=(1, 3))
        assert np.corrcoef(shrunk.ravel(), images[index].ravel())[0, 1] > 0.6


def test_words_are_as_many_letters_as_can_be_seen() -> None:
    """Letters of upright faces stand apart, save where their serifs meet."""
    close = 0
    for sample in drawn("words"):
        pixels = looking.picture(sample)
        assert re.fullmatch(r"[A-Z]{3,5}", sample.answer)
        dark = looking.ink(pixels)
        assert not dark[:, [0, -1]].any()
        assert not dark[[0, -1]].any()
        close += len(looking.blobs(pixels)) == len(sample.answer)
    assert close > 0.6 * NUM_CHECKED
    assert len(set(words.WORDS)) == len(words.WORDS)


def worked_out(a: int, b: int, is_plus: bool) -> str:
    return f"{a}+{b}={a + b}" if is_plus else f"{a}-{b}={a - b}"


def test_sums() -> None:
    for sample in drawn("sums"):
        a, b = map(int, re.findall(r"\d+", looking.question(sample)))
        if "from" in looking.question(sample):
            a, b = b, a
        is_plus = bool(re.search(r"\+|Add|加", looking.question(sample)))
        *ones, last = sample.answer.split(", ")
        assert last == worked_out(a, b, is_plus)
        assert is_plus or a >= b
        # A sum of ones comes first, just when there are tens that it leaves alone, or one fewer.
        in_ones = a % 10 + (0 if is_plus or a % 10 >= b else 10)
        assert ones == ([worked_out(in_ones, b, is_plus)] if in_ones != a else [])


def test_lookups() -> None:
    """The row that was asked for."""
    for sample in drawn("lookup"):
        _, *rows, asked = looking.question(sample).split("\n")
        (known,) = (row for row in rows if row[:2] in asked)
        assert sample.answer == known


def test_copies() -> None:
    for sample in drawn("copy") + drawn("recall"):
        assert re.findall(r"[A-Z0-9]{3,4}", looking.question(sample)) == [sample.answer]


@pytest.mark.parametrize("task", TASKS)
def test_sizes_are_small(task: str) -> None:
    for sample in drawn(task, 20):
        for item in sample.media:
            pixels = looking.pixels(item)
            assert pixels.dtype == np.uint8
            height, width, channels = pixels.shape[-3:]
            assert (height % 28, width % 28, channels) == (0, 0, 3)
            assert 4 <= height * width // 784 <= 16
            if isinstance(item, Clip):
                assert len(pixels) in (4, 6, 8)


@pytest.mark.parametrize("task", TASKS)
def test_both_languages_and_both_orders_of_question_and_media(task: str) -> None:
    samples = drawn(task, NUM_COUNTED)
    languages = Counter(sample.language for sample in samples)
    assert min(languages[language] for language in Language) > 0.4 * NUM_COUNTED
    for sample in samples:
        is_chinese = bool(re.search(r"[\u4e00-\u9fff]", looking.question(sample)))
        assert is_chinese == (sample.language is Language.CHINESE) or task == "sums"
    assert len({re.sub(r"\d+", "0", looking.question(sample)) for sample in samples}) >= 4
    if samples[0].media:
        first = sum(hasattr(sample.messages[0].parts[0], "text") for sample in samples)
        assert 0.15 < first / NUM_COUNTED < 0.35


def decisive(sample: Sample) -> str:
    """The answer without what was told on the way and the names of what was asked for."""
    names = COLOUR_NAMES if sample.task == "same" else {}
    words = [name.of(sample.language) for name in ({**SHAPE_NAMES, **names}).values()]
    last = re.split("[:：]|So |所以", sample.answer)[-1]
    return sample.answer if sample.task == "shape" else re.sub("|".join(words), "", last)


@pytest.mark.parametrize("task", sorted(set(TASKS) - OPEN))
@pytest.mark.parametrize("split", list(Split))
def test_no_answer_is_rare_or_prevails(task: str, split: Split) -> None:
    stream = Stream({task: 1}, seed=3, split=split)
    samples = list(islice(stream.samples(), NUM_COUNTED))
    for language in Language:
        answers = Counter(decisive(s) for s in samples if s.language is language)
        expected = answers.total() / len(answers)
        assert len(answers) > 1
        assert max(answers.values()) < 2 * expected
        assert min(answers.values()) > 0.25 * expected
