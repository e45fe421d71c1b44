"""A least-recently-used cache bounded in bytes. Not thread-safe: one owner uses it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class _Entry(NamedTuple, Generic[T]):
    value: T
    num_bytes: int


class ByteLRU(Generic[T]):
    """Keeps the values used last, as many as fit `budget_bytes`."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[str, _Entry[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> T | None:
        """The value, which then counts as used last; None when it is not held."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry.value

    def put(self, key: str, value: T, num_bytes: int) -> bool:
        """Keeps a value, dropping those unused for longest; False if it exceeds the budget."""
        self.discard(key)
        if num_bytes > self.budget_bytes:
            return False
        while self.num_bytes + num_bytes > self.budget_bytes:
            self.discard(next(iter(self._entries)))
        self._entries[key] = _Entry(value, num_bytes)
        self.num_bytes += num_bytes
        return True

    def discard(self, key: str) -> None:
        """Drops a value if it is held."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes
