"""How many experts are computed together: so many that what they need at a time has a bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

SCRATCH_BYTES = 256 << 20
"""Of decoded weights, inner activations and results held at a time. An expert that needs more than
that gets it: its share is bounded by the dispatch."""


def groups(counts: Sequence[int], *, pair_bytes: int, expert_bytes: int = 0) -> Iterator[range]:
    """Ascending runs of experts that fit SCRATCH_BYTES; each begins and ends with one that has
    pairs, and together they hold all pairs.

    counts: the pairs of each expert. pair_bytes, expert_bytes: what each of them needs.
    """
    first = last = num_pairs = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        used = (expert + 1 - first) * expert_bytes + (num_pairs + count) * pair_bytes
        if num_pairs and used > SCRATCH_BYTES:
            yield range(first, last + 1)
            num_pairs = 0
        first, last = expert if not num_pairs else first, expert
        num_pairs += count
    if num_pairs:
        yield range(first, last + 1)
