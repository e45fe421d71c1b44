"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Passed(NamedTuple):
    """Text that may be shown, and the stop string that ended it, if any."""

    text: str
    stop: str | None = None


class StopStrings:
    """Ends a text at its first stop string and shows nothing of it, not even for a moment.

    The first one is the one that is complete first; of several that end together, the longest. So
    it does not matter into which pieces the text is cut. A piece may be exempt: stop strings that
    end in it do not count.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """include: show the stop string that ended the text."""
        self._stops, self._include = tuple(stops), include
        self._held = ""

    def push(self, text: str, *, is_exempt: bool = False) -> Passed:
        """The next piece. Nothing may follow one that is answered with a stop string."""
        if not self._stops:
            return Passed(text)
        num_held = len(self._held)
        text = self._held + text
        found = None if is_exempt else self._first(text, num_held)
        if found is not None:
            self._held = ""
            start, end = found
            return Passed(text[: end if self._include else start], text[start:end])
        num_shown = len(text) - self._num_unsettled(text)
        self._held = text[num_shown:]
        return Passed(text[:num_shown])

    def flush(self) -> str:
        """What was held back; the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str, num_old: int) -> tuple[int, int] | None:
        """Start and end of the first stop string that ends behind the first `num_old` characters.

        Those that end before would have ended the text, or are exempt.
        """
        found: list[tuple[int, int]] = []
        for stop in self._stops:
            start = text.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start))
        if not found:
            return None
        end, start = min(found)
        return start, end

    def _num_unsettled(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
