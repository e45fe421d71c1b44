"""Which tokens run in the next step. A pure data structure: no torch, no clock, no threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from chiasm import errors
from chiasm.services.decoder.sequence import Sequence
from chiasm.types import Modality


class Reservations(Protocol):
    """The part of the KV cache that admission needs."""

    def can_reserve(self, num_tokens: int) -> bool: ...

    def reserve(self, sequence_id: int, num_tokens: int) -> None: ...

    def release(self, sequence_id: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens [start, start + num_tokens) of one sequence."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_last(self) -> bool:
        """True when the step yields the sequence's next token."""
        return self.stop == len(self.sequence.token_ids)

    @property
    def modalities(self) -> frozenset[Modality]:
        return self.sequence.modalities(self.start, self.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One step: chunks that run and sequences that cannot for want of a pool."""

    chunks: tuple[Chunk, ...]
    parked: tuple[Sequence, ...]
    admitted: tuple[Sequence, ...]


class Scheduler:
    """Decodes go first; prefills in order of arrival share what is left of the step's tokens."""

    def __init__(
        self, cache: Reservations, *, max_running: int, max_waiting: int, max_step_tokens: int
    ) -> None:
        self._cache = cache
        self._max_running, self._max_waiting = max_running, max_waiting
        self._max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence in hand."""
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. Raises ResourceExhausted when the queue is full."""
        if len(self.waiting) >= self._max_waiting:
            raise errors.ResourceExhausted("the decoder's queue is full", retry_after_s=1.0)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its cache."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._cache.release(id(sequence))
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self, pools: frozenset[Modality]) -> Schedule:
        """The next step, given the pools that can answer now."""
        admitted = tuple(self._admit())
        budget = self._max_step_tokens
        chunks, parked = [], []
        decoding = [s for s in self.running if s.num_pending == 1]
        prefilling = [s for s in self.running if s.num_pending > 1]
        for sequence in (*decoding, *prefilling):
            num_tokens = min(sequence.num_pending, budget)
            if not num_tokens:
                break
            chunk = Chunk(sequence=sequence, start=sequence.num_computed, num_tokens=num_tokens)
            if chunk.modalities <= pools:
                chunks.append(chunk)
                budget -= num_tokens
            else:
                parked.append(sequence)
        return Schedule(chunks=tuple(chunks), parked=tuple(parked), admitted=admitted)

    def _admit(self) -> Iterator[Sequence]:
        """Moves waiting sequences to the batch while their whole need of cache fits."""
        while self.waiting and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            if not self._cache.can_reserve(sequence.max_tokens):
                return
            self.waiting.popleft()
            self._cache.reserve(id(sequence), sequence.max_tokens)
            self.running.append(sequence)
            yield sequence
