"""Where a sequence's tokens stand in a batch and in the cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Rows [row, row + num_tokens) of a batch are tokens [start, start + num_tokens) of a sequence.

    runs: (first slot, number of slots) of the cache, in token order; they cover at least all tokens
    up to the segment's end.
    """

    row: int
    start: int
    num_tokens: int
    runs: tuple[tuple[int, int], ...]

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens

    def pieces(self, num_tokens: int) -> list[tuple[int, int]]:
        """The slots of tokens [0, num_tokens) as [first, last) ranges."""
        found, left = [], num_tokens
        for first, length in self.runs:
            if not left:
                break
            taken = min(length, left)
            found.append((first, first + taken))
            left -= taken
        return found
