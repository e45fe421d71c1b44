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
        "digits": 7,
        "shape": 2,
        "colour": 5,
        "description": 3,
        "count": 3,
        "place": 5,
        "relation": 5,
        "words": 36,
        "bars": 5,
        "same": 6,
        "more": 2,
        "motion": 4,
        "sums": 9,
        "lookup": 3,
        "copy": 3,
        "recall": 0.7,
        "inventory": 3,
        "colours": 3,
        "places": 3,
        "letters": 5,
        "lines": 20,
        "ranking": 3,
        "alike": 6,
        "retold": 2,
        "told": 8,
    }
)
"""Weight of each task in samples: hard ones, and those with the most to learn, come more often."""

SEE: Mapping[str, float] = MappingProxyType(
    {
        "digits": 3,
        "description": 4,
        "same": 4,
        "inventory": 4,
        "place": 2,
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
        "colours": 4,
        "places": 4,
        "count": 2,
        "sums": 3,
        "lookup": 2,
        "alike": 2,
        "retold": 2,
        "told": 2,
        "copy": 1,
        "recall": 0.2,
    }
)
"""One thing at a time: how a picture is looked at."""

ARRANGE: Mapping[str, float] = MappingProxyType(
    {
        "digits": 4,
        "description": 3,
        "shape": 2,
        "colour": 5,
        "count": 2,
        "place": 5,
        "relation": 5,
        "same": 5,
        "more": 2,
        "motion": 4,
        "bars": 2,
        "ranking": 4,
        "inventory": 4,
        "colours": 4,
        "places": 4,
        "letters": 3,
        "sums": 4,
        "lookup": 3,
        "alike": 4,
        "retold": 3,
        "told": 4,
        "copy": 1,
        "recall": 0.2,
    }
)
"""Several things, and how they lie to one another."""

READ: Mapping[str, float] = MappingProxyType(
    {
        **MIX,
        "words": 120,
        "lines": 40,
        "letters": 15,
        "digits": 15,
        "description": 10,
        "shape": 6,
    }
)
"""Words, the hardest thing to see, and all else so that it stays."""
