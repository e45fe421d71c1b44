"""All tasks, and how often each of them is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from chiasm.training.data import bars, digits, motion, pairs, scenes, texts, words
from chiasm.training.data.sample import Task

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for module in (digits, scenes, words, bars, pairs, motion, texts)
        for task in module.TASKS
    }
)
"""By name."""

MIX: Mapping[str, float] = MappingProxyType(
    {
        "digits": 8,
        "shape": 5,
        "colour": 7,
        "description": 6,
        "count": 5,
        "place": 7,
        "relation": 9,
        "words": 26,
        "bars": 9,
        "same": 10,
        "more": 3,
        "motion": 6,
        "sums": 6,
        "lookup": 9,
        "copy": 3,
    }
)
"""Weight of each task in samples: hard ones, and those with the most to learn, come more often."""
