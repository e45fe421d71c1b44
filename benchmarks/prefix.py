"""The prefix cache: time to the first token of a new prompt, and of one known but for its end.

New and known prompts take turns; the ratio is of neighbours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from chiasm.client import Client, Delta, Finished, Sampling, Tokens
from chiasm.local import LocalStack, StackConfig

LENGTHS = (256, 1024, 3072)
TAIL = 16
"""Tokens at the end of a prompt that are its own."""

ROUNDS = 5
ONE_TOKEN = Sampling(max_tokens=1, temperature=0, ignore_eos=True)


def run(model: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Seconds to the first token by length of the shared prefix, and known / new."""
    generator, found = np.random.default_rng(0), []
    with _client(model) as client:
        for length in LENGTHS:
            new: list[float] = []
            known: list[float] = []
            for _ in range(ROUNDS + 1):
                prefix = generator.integers(10, 400, length).tolist()
                for seconds, is_known in ((new, False), (known, True)):
                    ids = prefix + generator.integers(10, 400, TAIL).tolist()
                    elapsed, num_cached = _first_token(client, ids)
                    if (num_cached > 0) is not is_known:
                        raise RuntimeError(f"{num_cached} of {len(ids)} tokens were cached")
                    seconds.append(elapsed)
            new, known = new[1:], known[1:]
            ratios = [k / n for n, k in zip(new, known, strict=True)]
            found.append(
                {"prefix_tokens": length, "new_s": new, "known_s": known, "known_over_new": ratios}
            )
            report(
                f"{length:5d} tokens: new {statistics.median(new) * 1e3:.0f} ms, known "
                f"{statistics.median(known) * 1e3:.0f} ms, known / new "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
    return {"seconds_to_first_token": found}


def _first_token(client: Client, ids: list[int]) -> tuple[float, int]:
    """Seconds to the first token as the client sees it, and the prompt's cached tokens."""
    start, elapsed = time.perf_counter(), 0.0
    for event in client.generate(Tokens(token_ids=ids), sampling=ONE_TOKEN):
        if isinstance(event, Delta):
            elapsed = elapsed or time.perf_counter() - start
        elif isinstance(event, Finished):
            return elapsed, event.usage.cached_tokens
    raise RuntimeError("the stream has no end")


@contextmanager
def _client(model: Path) -> Iterator[Client]:
    stack = LocalStack(StackConfig(model=model))
    try:
        with Client(stack.start(), timeout_s=600) as client:
            yield client
    finally:
        stack.stop()
