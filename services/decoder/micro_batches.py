"""Ping-pong micro-batches: while one half of a step is at the experts, the other does attention.

Splitting a step hides waiting, and costs a second round of kernels and dispatches. Which weighs
more depends on the machine, the pools and the step's size, so it is measured: steps are compared by
what they took a token, in classes of like size, split and whole. A class whose steps spend little
of their time waiting is not worth the try.

A request that is alone is never split: its rounding then does not depend on what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from chiasm.services.decoder.scheduler import Chunk

MIN_WAIT_SHARE = 0.1
"""Share of a whole step spent waiting for experts, below which a split cannot pay."""

RECHECK_STEPS = 128
"""After so many steps of a class the way not taken is measured once more: conditions change."""

SMOOTHING = 0.2
"""Weight of the newest step in the moving averages."""


@dataclass(slots=True)
class _Way:
    """What steps of one class took, done one way: nanoseconds a token, and the waiting in it."""

    num_steps: int = 0
    step_ns: float = 0.0
    wait_ns: float = 0.0

    def add(self, step_ns: float, wait_ns: float) -> None:
        self.num_steps += 1
        weight = max(SMOOTHING, 1 / self.num_steps)
        self.step_ns += weight * (step_ns - self.step_ns)
        self.wait_ns += weight * (wait_ns - self.wait_ns)


@dataclass(slots=True)
class _Class:
    """Steps of like size."""

    num_steps: int = 0
    whole: _Way = field(default_factory=_Way)
    split: _Way = field(default_factory=_Way)


class MicroBatchPolicy:
    """Decides from measured steps. Pure: times are handed in."""

    WARM_UP = 3
    """Steps each way must have been measured before they are compared."""

    def __init__(self) -> None:
        self._classes: dict[tuple[int, bool], _Class] = {}

    def should_split(self, chunks: Seq[Chunk]) -> bool:
        """Whether to run these chunks as two micro-batches."""
        if len(chunks) < 2:
            return False
        known = self._classes.setdefault(_kind(chunks), _Class())
        whole, split = known.whole, known.split
        if whole.num_steps < self.WARM_UP:
            return False
        if whole.wait_ns < MIN_WAIT_SHARE * whole.step_ns:
            return False
        if split.num_steps < self.WARM_UP:
            return True
        best_is_split = split.step_ns < whole.step_ns
        return best_is_split != (known.num_steps % RECHECK_STEPS == 0)

    def record(self, chunks: Seq[Chunk], *, was_split: bool, step_ns: int, wait_ns: int) -> None:
        """Books a step: its whole time and the time it stood waiting for experts."""
        num_tokens = sum(c.num_tokens for c in chunks)
        known = self._classes.setdefault(_kind(chunks), _Class())
        known.num_steps += 1
        way = known.split if was_split else known.whole
        way.add(step_ns / num_tokens, wait_ns / num_tokens)


def halves(chunks: Seq[Chunk]) -> tuple[list[Chunk], list[Chunk]]:
    """Two micro-batches of about as many tokens, together the same rows in the same order.

    A chunk may be cut: its second part attends to the first, which is ahead at every layer.
    """
    left = (sum(c.num_tokens for c in chunks) + 1) // 2
    first: list[Chunk] = []
    second: list[Chunk] = []
    for chunk in chunks:
        taken = min(left, chunk.num_tokens)
        left -= taken
        if taken:
            first.append(replace(chunk, num_tokens=taken))
        if taken < chunk.num_tokens:
            rest = chunk.num_tokens - taken
            second.append(replace(chunk, start=chunk.start + taken, num_tokens=rest))
    return first, second


def _kind(chunks: Seq[Chunk]) -> tuple[int, bool]:
    """Steps are alike when their sizes have the same power of two and both or neither prefill."""
    num_tokens = sum(c.num_tokens for c in chunks)
    return num_tokens.bit_length(), num_tokens > len(chunks)
