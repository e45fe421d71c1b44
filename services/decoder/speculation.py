"""Speculation: guesses of a request's next tokens, which one step then checks all at once.

Guesses come from the request's own tokens: what followed when the end of its text last stood there
(prompt look-up). They cost no second model, and are good where an answer repeats the prompt or
itself. A guess is kept only if the model, with the request's own random number, chooses the same
token; so the answer is the one it would have been.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from chiasm.services.decoder.processors import needs_processors
from chiasm.services.decoder.sequence import Sequence

MIN_MATCH, MAX_MATCH = 2, 8
"""Tokens of the text's end that must have stood there before, and that are looked at."""

MAX_PAUSE = 64
"""Bound of the tokens that pass without a guess after guesses that were wrong."""


def look_up(tokens: npt.NDArray[np.uint32], count: int) -> list[int]:
    """What followed the latest of the earlier places that match the end of `tokens` for longest.

    Exactly `count` tokens, or none where no MIN_MATCH tokens match. A place so near to the end that
    it runs into it is taken to repeat.
    """
    if len(tokens) <= MIN_MATCH:
        return []
    ends = np.flatnonzero(tokens[:-1] == tokens[-1]) + 1
    best = 0
    for length in range(2, MAX_MATCH + 1):
        ends = ends[ends >= length]
        ends = ends[tokens[ends - length] == tokens[-length]]
        if not ends.size:
            break
        if length >= MIN_MATCH:
            best = int(ends[-1])
    if not best:
        return []
    period = len(tokens) - best
    found: list[int] = tokens[best : best + count].tolist()
    return [found[i % period] for i in range(count)]


class Drafts:
    """Guesses for one request: how many, and whether at all, follows from how good they were."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = self._num_tokens = max_tokens
        self._tokens = array("I")
        self._num_misses = self._pause = 0

    def draft(self, token_ids: Seq[int], room: int) -> tuple[int, ...]:
        """At most `room` tokens that may follow. `token_ids` has only grown since the last call."""
        self._pause -= 1
        count = min(self._num_tokens, room)
        if self._pause >= 0 or count <= 0:
            return ()
        self._tokens.extend(token_ids[len(self._tokens) :])
        return tuple(look_up(np.frombuffer(self._tokens, dtype=np.uint32), count))

    def record(self, num_accepted: int) -> None:
        """Books how many of the last guesses were right."""
        self._num_tokens = min(2 * (num_accepted + 1), self._max_tokens)
        self._num_misses = 0 if num_accepted else self._num_misses + 1
        self._pause = min(2**self._num_misses, MAX_PAUSE) if self._num_misses else 0


class Speculation:
    """Guesses for the requests of a decoder; at most `max_tokens` at once for each.

    Requests whose logits are changed by what they have so far are left alone: such changes would
    have to be worked out guess by guess.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def draft(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """Guesses for a sequence that waits for nothing but its next token."""
        if needs_processors(sequence):
            return ()
        if sequence.drafts is None:
            sequence.drafts = Drafts(self._max_tokens)
        return tuple(sequence.drafts.draft(sequence.token_ids, room))


def num_accepted(draft: Seq[int], chosen: Seq[int]) -> int:
    """How many guesses stand: `chosen[i]` is what the model chose in place of `draft[i]`, provided
    that all guesses before it stand."""
    for i, (guess, token_id) in enumerate(zip(draft, chosen, strict=False)):
        if guess != token_id:
            return i
    return len(draft)
