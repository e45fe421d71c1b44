"""Which samples there are, in which order: splits that share nothing, mixes and lessons."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice

import looking
import numpy as np
import pytest

from chiasm.errors import InvalidArgument
from chiasm.training.data import digits
from chiasm.training.data.sample import Clip, Picture, Sample, Split
from chiasm.training.data.stream import Lesson, Stream, held_out
from chiasm.training.data.tasks import ARRANGE, LOOK, MIX, PRACTICE, TASKS

NUM_TRAINED = 400


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint(task: str) -> None:
    """Whatever the seeds."""
    keys = {
        split: {
            sample.key
            for seed in range(2)
            for sample in islice(Stream({task: 1}, seed=seed, split=split).samples(), 200)
        }
        for split in Split
    }
    assert all(keys.values())
    assert not keys[Split.TRAIN] & keys[Split.HELD_OUT]


def shown_sum(sample: Sample) -> tuple[str, int, int]:
    """Sign and numbers of what is asked, in whichever words."""
    text = looking.question(sample)
    first, second = map(int, re.findall(r"\d+", text))
    is_plus = bool(re.search(r"\+|Add|加", text))
    return ("+", first, second) if is_plus else ("-", *sorted((first, second), reverse=True))


def shown_scan(sample: Sample) -> bytes:
    """The scan that the key names: pictures are disturbed anew, so that no two are ever the same.
    test_tasks.py holds them against the scan."""
    (index,) = sample.key
    return digits.scans()[0][index].tobytes()


SHOWN: Mapping[str, Callable[[Sample], object]] = {
    "digits": shown_scan,
    "words": lambda sample: sample.answer,
    "sums": shown_sum,
    "copy": lambda sample: sample.answer,
    "recall": lambda sample: sample.answer,
}


@pytest.mark.parametrize("task", SHOWN)
def test_no_held_out_scan_word_sum_or_code_is_seen_in_training(task: str) -> None:
    """By what the samples show, not by what they are filed under."""
    training = islice(Stream({task: 1}, seed=7).samples(), NUM_TRAINED)
    trained = {SHOWN[task](sample) for sample in training}
    judged = {SHOWN[task](sample) for sample in held_out(task, 100)}
    assert len(judged) == 100
    assert not trained & judged


@pytest.mark.parametrize("task", TASKS)
def test_held_out_samples_differ_and_are_enough(task: str) -> None:
    samples = held_out(task, 150)
    assert len({sample.key for sample in samples}) == len(samples) == 150
    assert all(TASKS[task].split_of(sample.key) is Split.HELD_OUT for sample in samples)


def test_a_task_gives_what_it_has() -> None:
    held = held_out("digits", 1000)
    images, _ = digits.scans()
    assert 180 < len(held) < 270
    assert {s.key for s in held} == {
        (i,) for i in range(len(images)) if TASKS["digits"].split_of((i,)) is Split.HELD_OUT
    }


def test_a_sample_is_a_function_of_seed_split_and_index() -> None:
    one, other = Stream(seed=5), Stream(seed=5)
    backwards = [one.sample(i) for i in range(46, 6, -1)]
    assert {type(item) for sample in backwards for item in sample.media} == {Picture, Clip}
    for sample, same in zip(backwards[::-1], islice(other.samples(7), 40), strict=True):
        assert (sample.key, sample.messages, sample.answer) == (
            same.key,
            same.messages,
            same.answer,
        )
        for item, twin in zip(sample.media, same.media, strict=True):
            np.testing.assert_array_equal(looking.pixels(item), looking.pixels(twin))
    others = [Stream(seed=6), Stream(seed=5, split=Split.HELD_OUT)]
    assert all(
        [s.sample(i).key for i in range(9)] != [one.sample(i).key for i in range(9)] for s in others
    )


def test_the_mix_is_kept() -> None:
    assert set(MIX) == {*TASKS, *PRACTICE}
    counts = Counter(s.task for s in islice(Stream({"sums": 3, "copy": 1}).samples(), 400))
    assert counts.keys() == {"sums", "copy"}
    assert 0.67 < counts["sums"] / 400 < 0.83


def test_lessons_come_first_one_after_another() -> None:
    lessons = [
        Lesson(num_samples=5, mix={"sums": 1}),
        Lesson(num_samples=3, mix={"copy": 1, "lookup": 1}),
    ]
    stream = Stream({"count": 1}, lessons=lessons)
    tasks = [stream.sample(i).task for i in range(20)]
    assert set(tasks[:5]) == {"sums"}
    assert set(tasks[5:8]) <= {"copy", "lookup"}
    assert set(tasks[8:]) == {"count"}
    assert [sample.task for sample in islice(stream.samples(4), 6)] == tasks[4:10]
    plain = Stream({"count": 1})
    assert [stream.sample(i).key for i in range(8, 20)] == [
        plain.sample(i).key for i in range(8, 20)
    ]


@pytest.mark.parametrize("mix", [LOOK, ARRANGE, MIX])
def test_lessons_are_mixes(mix: Mapping[str, float]) -> None:
    assert set(mix) <= {*TASKS, *PRACTICE}
    Stream(mix)


@pytest.mark.parametrize("mix", [{}, {"chess": 1.0}, {"sums": 0.0}, {"sums": float("nan")}])
def test_what_is_no_mix(mix: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Stream(mix)
    assert caught.value.field == "mix"
