"""Which tokens run in the next step, and whose keys and values get which blocks.

A pure data structure: no torch, no clock, no threads. Requests are served by priority, then by
arrival. A request is admitted when the blocks of all its tokens are there, or when less urgent ones
have them; while it decodes it takes blocks as it grows. When none are left, the request that came
last gives its blocks back and waits; it is computed again later, from the prefix cache where that
still has its beginning.

A request whose answer is not read stands still, and gives its blocks back to whoever needs them.

Guesses of speculation take what is left of a step and of the blocks: nobody waits for them.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Protocol

from chiasm import errors
from chiasm.services.decoder.blocks import BlockPool, BlockTable
from chiasm.services.decoder.prefix import block_digest
from chiasm.services.decoder.sequence import Sequence
from chiasm.types import Modality


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens [start, start + num_tokens) of one sequence; those of `draft` follow its own."""

    sequence: Sequence
    start: int
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_last(self) -> bool:
        """True when the step yields the sequence's next token."""
        return self.stop >= len(self.sequence.token_ids)

    @property
    def token_ids(self) -> list[int]:
        own = self.sequence.token_ids
        num_own = len(own)
        guessed = self.draft[max(0, self.start - num_own) : max(0, self.stop - num_own)]
        return [*own[self.start : self.stop], *guessed]

    @property
    def modalities(self) -> frozenset[Modality]:
        return self.sequence.modalities(self.start, self.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One step: chunks that run, sequences that cannot for want of a pool, who came and went."""

    chunks: tuple[Chunk, ...]
    parked: tuple[Sequence, ...]
    admitted: tuple[Sequence, ...]
    preempted: tuple[Sequence, ...]


class Drafter(Protocol):
    """Guesses what comes next."""

    def draft(self, sequence: Sequence, room: int) -> Seq[int]:
        """At most `room` tokens that may follow the sequence's own."""
        ...


class Scheduler:
    """Decodes go first. Of the tokens left in the step half go to the prefill that is next in
    order, the rest to the shortest ones: a long prompt neither starves nor holds up the others."""

    def __init__(
        self,
        blocks: BlockPool,
        *,
        max_running: int,
        max_waiting: int,
        max_step_tokens: int,
        drafter: Drafter | None = None,
    ) -> None:
        self.blocks, self._drafter = blocks, drafter
        self.max_running, self._max_waiting = max_running, max_waiting
        self._max_step_tokens = max_step_tokens
        self._num_arrived = 0
        self.waiting: list[Sequence] = []  # both in order of _rank
        self.running: list[Sequence] = []

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence in hand."""
        yield from self.running
        yield from self.waiting

    def check_room(self, num_coming: int = 0) -> None:
        """Raises ResourceExhausted when the queue is full once `num_coming` others are in it."""
        num_free = max(0, self.max_running - len(self.running))  # no place in the queue is theirs
        if len(self.waiting) + num_coming >= self._max_waiting + num_free:
            raise errors.ResourceExhausted("the decoder's queue is full", retry_after_s=1.0)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. Raises ResourceExhausted when the queue is full, or when the cache
        could not hold the sequence even if it were alone."""
        self.check_room()
        capacity = self.blocks.num_blocks * self.blocks.block_size
        if sequence.max_tokens > capacity:
            raise errors.ResourceExhausted(
                f"{sequence.max_tokens} tokens exceed the KV cache of {capacity}",
                reason="KV_CACHE_TOO_SMALL",
            )
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        bisect.insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self, pools: frozenset[Modality]) -> Schedule:
        """The next step, given the pools that can answer now."""
        for sequence in self.running:
            self._give_back(sequence)
        behind = {s for s in self if s.is_behind()}
        idle = [
            s for s in self.running if s in behind or not self._can_run(s, s.num_computed, pools)
        ]
        stuck = list(idle)  # those of the batch that can make room for others
        preempted: list[Sequence] = []
        admitted, passed_over = self._admit(pools, behind, stuck, preempted)
        chunks: list[Chunk] = []
        budget = self._max_step_tokens
        able = [s for s in self.running if s not in idle]
        for sequence in [s for s in able if s.num_pending == 1][:budget]:
            if sequence not in preempted and self._grow(sequence, stuck, preempted):
                chunks.append(Chunk(sequence=sequence, start=sequence.num_computed, num_tokens=1))
        prefills = [s for s in able if s.num_pending > 1 and s not in preempted]
        shares = list(_share(prefills, budget - len(chunks)))
        chunks = self._drafted(chunks, budget - len(chunks) - sum(c.num_tokens for c in shares))
        return Schedule(
            chunks=(*chunks, *shares),
            parked=(*(s for s in idle if s not in behind), *passed_over),
            admitted=tuple(admitted),
            preempted=tuple(preempted),
        )

    def commit(self, sequence: Sequence, num_computed: int) -> None:
        """Books tokens as computed; blocks that are full now can be found by other sequences."""
        sequence.num_computed = num_computed
        num_full = num_computed // self.blocks.block_size
        digests = self._digests(sequence, num_full)
        for index in range(sequence.num_sealed, num_full):
            self.blocks.seal(sequence.table.blocks[index], digests[index])
        sequence.num_sealed = max(sequence.num_sealed, num_full)

    def forget(self, sequence: Sequence) -> None:
        """Lets nobody find what the sequence has computed: its keys and values are unsound, or
        those that it found were."""
        for digest in sequence.digests:
            self.blocks.forget(digest)

    def _can_run(self, sequence: Sequence, start: int, pools: frozenset[Modality]) -> bool:
        """Whether the pools are there that a step from token `start` on may need."""
        if len(pools) == len(Modality):
            return True
        reach = min(len(sequence.token_ids), start + self._max_step_tokens)
        return sequence.modalities(start, reach) <= pools

    def _admit(
        self,
        pools: frozenset[Modality],
        behind: set[Sequence],
        stuck: list[Sequence],
        preempted: list[Sequence],
    ) -> tuple[list[Sequence], list[Sequence]]:
        """Moves waiting sequences to the batch, strictly in order, while there is room for them.

        Those `behind` and those whose pool is away are passed over, and those `stuck` in the batch
        give way: nobody waits for a pool or a reader that is not his. So do less urgent ones.
        Returns who was admitted and who was passed over for a pool.
        """
        admitted: list[Sequence] = []
        passed_over: list[Sequence] = []
        for sequence in tuple(self.waiting):
            first = bisect.bisect_right(self.running, sequence.priority, key=lambda s: s.priority)
            yielding = [*(s for s in self.running[first:] if s not in stuck), *stuck]
            if len(self.running) >= self.max_running and not yielding:
                break
            if sequence in behind:
                continue
            cached = self._known_prefix(sequence)
            if not self._can_run(sequence, len(cached) * self.blocks.block_size, pools):
                passed_over.append(sequence)
                continue
            if not self._has_room(sequence, cached, without=yielding):
                break
            while not self._has_room(sequence, cached):
                self._preempt(yielding.pop(), preempted)
            stuck[:] = [s for s in stuck if s not in preempted]
            self._begin(sequence, cached)
            admitted.append(sequence)
        return admitted, passed_over

    def _has_room(
        self, sequence: Sequence, cached: list[int], *, without: Seq[Sequence] = ()
    ) -> bool:
        """Whether a sequence fits into the batch, once those `without` have left it."""
        num_running = len(self.running) - len(without)
        if num_running >= self.max_running:
            return False
        known = frozenset(cached) if without else frozenset()
        freed = (b for s in without for b in s.table.blocks if b not in known)
        num_available = self.blocks.num_available + self.blocks.num_freed(freed)
        num_new = self._num_blocks(len(sequence.token_ids)) - len(cached)
        # Whoever runs may need a block soon; giving it away now would preempt somebody then.
        return num_new + self.blocks.num_idle_among(cached) + num_running <= num_available

    def _begin(self, sequence: Sequence, cached: list[int]) -> None:
        """Moves a waiting sequence to the batch, with the blocks of all its tokens."""
        num_new = self._num_blocks(len(sequence.token_ids)) - len(cached)
        self.blocks.acquire(cached)
        sequence.table.extend(cached)
        sequence.table.extend(self.blocks.allocate(num_new, after=sequence.table.last))
        sequence.num_computed = sequence.num_cached = len(cached) * self.blocks.block_size
        sequence.num_sealed = len(cached)
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_rank)

    def _grow(self, sequence: Sequence, stuck: list[Sequence], preempted: list[Sequence]) -> bool:
        """Makes room for one more token, preempting who is stuck, then who came last; False if that
        is itself."""
        table = sequence.table
        while len(table) * self.blocks.block_size <= sequence.num_computed:
            if self.blocks.num_available:
                table.extend(self.blocks.allocate(1, after=table.last))
                continue
            victim = stuck.pop() if stuck else self.running[-1]
            self._preempt(victim, preempted)
            if victim is sequence:
                return False
        return True

    def _drafted(self, decodes: list[Chunk], budget: int) -> list[Chunk]:
        """The decodes with guesses behind them, as far as the budget and the free blocks go."""
        if self._drafter is None:
            return decodes
        found = []
        for chunk in decodes:
            room = min(budget, self._room_ahead(chunk.sequence))
            draft = tuple(self._drafter.draft(chunk.sequence, room)) if room > 0 else ()
            budget -= len(draft)
            self._extend(chunk.sequence, chunk.stop + len(draft))
            found.append(replace(chunk, num_tokens=1 + len(draft), draft=draft))
        return found

    def _room_ahead(self, sequence: Sequence) -> int:
        """Tokens that may be guessed: they are still wanted, and their blocks are to be had.

        Whoever runs may need a block soon: as many are left alone.
        """
        num_wanted = sequence.sampling.max_tokens - sequence.num_generated - 1
        num_spare = max(0, self.blocks.num_available - len(self.running))
        num_slots = (len(sequence.table) + num_spare) * self.blocks.block_size
        return min(num_wanted, num_slots - len(sequence.token_ids))

    def _extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Takes free blocks until there is a slot for each of the tokens."""
        table = sequence.table
        missing = self._num_blocks(num_tokens) - len(table)
        if missing > 0:
            table.extend(self.blocks.allocate(missing, after=table.last))

    def _give_back(self, sequence: Sequence) -> None:
        """Gives up the blocks of guesses that were wrong."""
        num_needed = self._num_blocks(len(sequence.token_ids))
        if len(sequence.table) > num_needed:
            self.blocks.release(sequence.table.cut(num_needed))

    def _preempt(self, victim: Sequence, preempted: list[Sequence]) -> None:
        """Puts a sequence of the batch back to where it waits."""
        self.running.remove(victim)
        self._release(victim)
        bisect.insort(self.waiting, victim, key=_rank)
        preempted.append(victim)

    def _known_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the sequence's beginning; at least one token is left to compute."""
        if sequence.needs_prompt_rows:
            return []
        num_full = (len(sequence.token_ids) - 1) // self.blocks.block_size
        return self.blocks.match(self._digests(sequence, num_full))

    def _digests(self, sequence: Sequence, count: int) -> list[bytes]:
        """The first `count` block digests, computed once."""
        size, digests = self.blocks.block_size, sequence.digests
        while len(digests) < count:
            start = len(digests) * size
            digests.append(
                block_digest(
                    digests[-1] if digests else b"",
                    sequence.token_ids[start : start + size],
                    sequence.types(start, start + size),
                    sequence.media,
                    start,
                )
            )
        return digests

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.blocks.block_size)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.table.blocks)
        sequence.table = BlockTable()
        sequence.num_sealed = sequence.num_computed = 0


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.arrival


def _share(prefills: list[Sequence], budget: int) -> Iterator[Chunk]:
    """Divides a step's tokens among prefills, which come in order: half for the first, the rest for
    the shortest of the highest priority."""
    if not prefills or not budget:
        return
    first, *others = prefills
    shares = {first: min(first.num_pending, budget - budget // 2 if others else budget)}
    left = budget - shares[first]
    for sequence in sorted(others, key=lambda s: (s.priority, s.num_pending)):
        shares[sequence] = min(sequence.num_pending, left)
        left -= shares[sequence]
    shares[first] = min(first.num_pending, shares[first] + left)
    for sequence in prefills:
        if num_tokens := shares[sequence]:
            yield Chunk(sequence=sequence, start=sequence.num_computed, num_tokens=num_tokens)
