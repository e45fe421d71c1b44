"""Memory that two processes of one host share.

An arena is a file in memory without a name: it is handed over as a file descriptor, and once both
ends are gone, however they went, the kernel has it back. One side writes, the other reads.
"""

from __future__ import annotations

import fcntl
import heapq
import mmap
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chiasm import errors

ALIGNMENT = 64
"""Payloads begin at multiples of this: a cache line."""

Bytes = npt.NDArray[np.uint8]


class Arena:
    """One mapped arena. The mapping ends with the last reference to it."""

    def __init__(self, descriptor: int, num_bytes: int, *, is_writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        memory = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED, protection)
        self._bytes: Bytes = np.frombuffer(memory, dtype=np.uint8)

    @property
    def num_bytes(self) -> int:
        return self._bytes.size

    def write(self, offset: int, data: Bytes) -> None:
        """Copies `data` in; the caller keeps to its region."""
        self._bytes[offset : offset + data.size] = data

    def read(self, offset: int, length: int) -> Bytes:
        """A copy, which the other end cannot change any more. Raises DataLoss out of bounds."""
        if offset + length > self.num_bytes:
            raise errors.DataLoss(f"{length} bytes at {offset} lie outside the arena")
        return self._bytes[offset : offset + length].copy()


def create(num_bytes: int) -> int:
    """A new arena's descriptor, sealed: nobody can take memory away under a mapping.

    Pages are taken when they are first written. Raises OSError.
    """
    descriptor = os.memfd_create("chiasm-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    try:
        os.ftruncate(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_received(descriptor: int, num_bytes: int, *, max_bytes: int, is_writable: bool) -> Arena:
    """Maps an arena that another process has made.

    Raises InvalidArgument when it is not as large as said, larger than `max_bytes` or could shrink,
    OSError when it cannot be mapped.
    """
    sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    if not sealed & fcntl.F_SEAL_SHRINK:
        raise errors.InvalidArgument("arena", "is not sealed against shrinking")
    if not 0 < num_bytes <= max_bytes:
        raise errors.InvalidArgument("arena", f"{num_bytes} bytes, at most {max_bytes} are mapped")
    if os.fstat(descriptor).st_size != num_bytes:
        raise errors.InvalidArgument("arena", f"is not of {num_bytes} bytes")
    return Arena(descriptor, num_bytes, is_writable=is_writable)


class Region:
    """A part of an arena that one message's payloads are written to, one after the other."""

    def __init__(self, arena: Arena, offset: int, length: int) -> None:
        """Raises InvalidArgument when it lies outside the arena."""
        if offset + length > arena.num_bytes:
            raise errors.InvalidArgument("region", "lies outside the arena")
        self._arena, self._next, self._end = arena, offset, offset + length

    def put(self, data: Bytes) -> int:
        """Copies `data` in and returns its offset. Raises InvalidArgument when it does not fit."""
        offset = -(-self._next // ALIGNMENT) * ALIGNMENT
        if offset + data.size > self._end:
            raise errors.InvalidArgument("region", f"{data.size} bytes do not fit")
        self._arena.write(offset, data)
        self._next = offset + data.size
        return offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Arenas:
    """Both directions of a lane."""

    requests: Arena
    answers: Arena


class Slots:
    """Equal parts of an arena, taken and given back; the lowest first, so that few are touched."""

    def __init__(self, count: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._free = list(range(count))

    def take(self) -> int | None:
        """Offset of a free slot; None when all are taken."""
        return heapq.heappop(self._free) * self.num_bytes if self._free else None

    def give_back(self, offset: int) -> None:
        """Frees a slot that `take` has returned."""
        heapq.heappush(self._free, offset // self.num_bytes)
