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
        "digits": 10,
        "shape": 4,
        "colour": 6,
        "description": 6,
        "count": 8,
        "place": 6,
        "relation": 8,
        "words": 22,
        "bars": 7,
        "same": 8,
        "more": 5,
        "motion": 5,
        "sums": 10,
        "lookup": 6,
        "copy": 5,
    }
)
"""Weight of each task in samples: hard ones, and those with the most to learn, come more often."""
