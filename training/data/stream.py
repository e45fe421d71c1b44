"""Endless samples by index: sample i is a function of the seed, the split and i alone.

So a run that stopped goes on exactly where it was, knowing no more than the next index.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from chiasm.errors import InvalidArgument
from chiasm.training.data.sample import Key, Sample, Split, Task
from chiasm.training.data.tasks import MIX, PRACTICE, TASKS

_PATIENCE = 10
"""Known samples in a row, for each one found, after which a task is taken to have no more: by then
one that is left would have been missed with probability e^-10."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """A mix of its own for the next `num_samples` samples."""

    num_samples: int
    mix: Mapping[str, float]


class Stream:
    """Samples of a mix of tasks, given as weights by name; `lessons` come first, one after another.

    Raises InvalidArgument for a task that does not exist and for weights that are no mix.
    """

    def __init__(
        self,
        mix: Mapping[str, float] = MIX,
        *,
        seed: int = 0,
        split: Split = Split.TRAIN,
        lessons: Sequence[Lesson] = (),
    ) -> None:
        self._mixes = [_Mix(each) for each in (*(lesson.mix for lesson in lessons), mix)]
        self._ends = list(itertools.accumulate(lesson.num_samples for lesson in lessons))
        self._seed, self._split = seed, split

    def sample(self, index: int) -> Sample:
        """Sample `index`, the same every time."""
        rng = Random(f"{self._seed}/{self._split}/{index}")
        return self._mixes[bisect_right(self._ends, index)].task(rng).sample(rng, self._split)

    def samples(self, start: int = 0) -> Iterator[Sample]:
        """All samples from index `start` on, without end."""
        return map(self.sample, itertools.count(start))


class _Mix:
    """Tasks, drawn by weight."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        known = {**TASKS, **PRACTICE}
        for name, weight in weights.items():
            if name not in known:
                raise InvalidArgument("mix", f"{name!r} is none of {', '.join(known)}")
            if not 0 < weight < float("inf"):
                raise InvalidArgument("mix", f"the weight of {name} must be above 0, not {weight}")
        if not weights:
            raise InvalidArgument("mix", "is empty")
        self._tasks = [known[name] for name in weights]
        self._bounds = list(itertools.accumulate(weights.values()))

    def task(self, rng: Random) -> Task:
        (task,) = rng.choices(self._tasks, cum_weights=self._bounds)
        return task


def held_out(task: str, num_samples: int, *, seed: int = 0) -> list[Sample]:
    """The first held-out samples of a task, no two about the same thing.

    Fewer than `num_samples` where the task has no more: it has only so many scans and sums.
    """
    found: dict[Key, Sample] = {}
    stream = Stream({task: 1.0}, seed=seed, split=Split.HELD_OUT)
    num_known = 0
    for sample in stream.samples():
        num_known = num_known + 1 if sample.key in found else 0
        found.setdefault(sample.key, sample)
        if len(found) == num_samples or num_known > _PATIENCE * len(found):
            break
    return list(found.values())
