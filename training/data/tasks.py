"""All tasks, and how often each of them is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from chiasm.training.data import bars, digits, motion, pairs, practice, scenes, texts, words
from chiasm.training.data.sample import Task

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for module in (digits, scenes, words, bars, pairs, motion, texts)
        for task in module.TASKS
    }
)
"""What is held out and asked for, by name."""

PRACTICE: Mapping[str, Task] = MappingProxyType({task.name: task for task in practice.TASKS})
"""What is trained on beside them, by name."""

MIX: Mapping[str, float] = MappingProxyType(
    {
        "digits": 8,
        "shape": 3,
        "colour": 5,
        "description": 4,
        "count": 4,
        "place": 6,
        "relation": 7,
        "words": 18,
        "bars": 5,
        "same": 7,
        "more": 2,
        "motion": 4,
        "sums": 6,
        "lookup": 4,
        "copy": 3,
        "inventory": 6,
        "colours": 6,
        "letters": 6,
        "lines": 14,
        "ranking": 3,
        "recall": 3,
    }
)
"""Weight of each task in samples: hard ones, and those with the most to learn, come more often."""

SEE: Mapping[str, float] = MappingProxyType(
    {
        "digits": 3,
        "description": 4,
        "same": 4,
        "inventory": 4,
        "letters": 3,
        "words": 8,
        "lines": 8,
        "ranking": 2,
        "motion": 3,
    }
)
"""Whatever probes can read, as many things at a time as there are."""

LOOK: Mapping[str, float] = MappingProxyType(
    {
        "digits": 4,
        "description": 8,
        "shape": 4,
        "colour": 4,
        "count": 2,
        "sums": 1,
        "recall": 1,
        "copy": 0.5,
    }
)
"""One thing at a time: how a picture is looked at."""

ARRANGE: Mapping[str, float] = MappingProxyType(
    {
        "digits": 4,
        "description": 4,
        "shape": 3,
        "colour": 5,
        "count": 2,
        "place": 4,
        "relation": 4,
        "same": 5,
        "more": 2,
        "motion": 4,
        "bars": 2,
        "ranking": 4,
        "inventory": 6,
        "colours": 6,
        "letters": 3,
        "sums": 2,
        "lookup": 2,
        "recall": 3,
        "copy": 1,
    }
)
"""Several things, and how they lie to one another."""
