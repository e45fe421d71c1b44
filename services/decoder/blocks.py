"""Blocks of the KV cache: who holds them, which prefixes they keep, which one goes next. Pure.

A block holds the keys and values of `block_size` consecutive tokens. It is referenced by any number
of sequences. A full block may be sealed under the digest of everything up to its end; another
sequence with the same beginning then finds it. Sealed blocks that nobody references stay findable
until their room is needed; those unused for longest go first.

Blocks are handed out in runs as long as possible, and a new run begins in the middle of the largest
gap, so that it can grow: attention reads a run as one piece of memory.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from chiasm import errors


class BlockPool:
    """`num_blocks` blocks; a block is free, held (referenced), or idle (sealed, unreferenced)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._references = np.zeros(num_blocks, dtype=np.int32)
        self._is_free = np.ones(num_blocks, dtype=np.bool_)
        self._num_free = num_blocks
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        """Blocks that can be had now: free or idle."""
        return self._num_free + len(self._idle)

    @property
    def num_held(self) -> int:
        """Blocks that some sequence references."""
        return self.num_blocks - self.num_available

    @property
    def num_idle(self) -> int:
        """Blocks kept for nobody but a later prefix."""
        return len(self._idle)

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """Blocks of the longest known prefix, in order; references are not taken."""
        found = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle_among(self, blocks: Sequence[int]) -> int:
        """How many of these blocks taking a reference would make unavailable."""
        return sum(block in self._idle for block in blocks)

    def num_freed(self, blocks: Iterable[int]) -> int:
        """How many blocks giving up one reference for each entry would make available."""
        given_up = Counter(blocks)
        return sum(self._references[block] == count for block, count in given_up.items())

    def acquire(self, blocks: Sequence[int]) -> None:
        """Takes a reference to each block, all of them held or idle."""
        for block in blocks:
            self._idle.pop(block, None)
            self._references[block] += 1

    def allocate(self, num_blocks: int, *, after: int | None = None) -> list[int]:
        """New blocks with one reference each; they continue the run that ends with `after` if they
        can.

        Raises ResourceExhausted, and takes none, when there are not enough.
        """
        if num_blocks > self.num_available:
            raise errors.ResourceExhausted("the KV cache is full", retry_after_s=1.0)
        while self._num_free < num_blocks:
            self._evict()
        taken: list[int] = []
        while len(taken) < num_blocks:
            wanted = num_blocks - len(taken)
            start = -1 if after is None else after + 1
            if not (0 < start < self.num_blocks and self._is_free[start]):
                start = self._gap(wanted)
            length = 1
            while length < wanted and start + length < self.num_blocks:
                if not self._is_free[start + length]:
                    break
                length += 1
            self._is_free[start : start + length] = False
            self._references[start : start + length] = 1
            self._num_free -= length
            taken.extend(range(start, start + length))
            after = taken[-1]
        return taken

    def seal(self, block: int, digest: bytes) -> None:
        """Makes a full block findable. The first block sealed under a digest is the one found."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self, digest: bytes) -> None:
        """Makes a block that is not to be trusted findable no more."""
        block = self._block_of.pop(digest, None)
        if block is None:
            return
        del self._digest_of[block]
        if block in self._idle:
            del self._idle[block]
            self._free(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Gives up one reference to each block.

        The last blocks of a sequence become idle first, so that they are evicted before the
        beginnings that more sequences are likely to share.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._digest_of:
                self._idle[block] = None
            else:
                self._free(block)

    def clear_idle(self) -> None:
        """Forgets every prefix that nobody uses now."""
        while self._idle:
            self._evict()

    def check(self) -> None:
        """Raises AssertionError when the books do not balance; for tests."""
        held = self._references > 0
        idle = np.zeros(self.num_blocks, dtype=np.bool_)
        idle[list(self._idle)] = True
        assert not (held & self._is_free).any()
        assert not (held & idle).any()
        assert (held | idle | self._is_free).all()
        assert self._num_free == int(self._is_free.sum())
        assert (self._references >= 0).all()
        assert {b: d for d, b in self._block_of.items()} == self._digest_of

    def _evict(self) -> None:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._digest_of.pop(block)]
        self._free(block)

    def _free(self, block: int) -> None:
        self._is_free[block] = True
        self._num_free += 1

    def _gap(self, wanted: int) -> int:
        """Where a new run begins: in the middle of the largest gap if it fits there, else at its
        start."""
        edges = np.flatnonzero(np.diff(self._is_free, prepend=False, append=False))
        starts, stops = edges[::2], edges[1::2]
        largest = int((stops - starts).argmax())
        start, size = int(starts[largest]), int(stops[largest] - starts[largest])
        # The gap's first half stays with the run before it, to grow into.
        return start + size // 2 if start and size >= 2 * wanted else start


class BlockTable:
    """A sequence's blocks in token order, and the same as runs: (first block, number of blocks)."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.runs: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def last(self) -> int | None:
        return self.blocks[-1] if self.blocks else None

    def cut(self, length: int) -> list[int]:
        """Takes off and returns the blocks behind the first `length`."""
        surplus = self.blocks[length:]
        del self.blocks[length:]
        for _ in surplus:
            first, count = self.runs.pop()
            if count > 1:
                self.runs.append((first, count - 1))
        return surplus

    def extend(self, blocks: Sequence[int]) -> None:
        """Appends blocks; those that continue the last run lengthen it."""
        self.blocks.extend(blocks)
        for block in blocks:
            first, count = self.runs[-1] if self.runs else (block, 0)
            if first + count == block:
                self.runs[-1:] = [(first, count + 1)]
            else:
                self.runs.append((block, 1))
