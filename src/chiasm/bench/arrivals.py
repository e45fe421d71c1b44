"""When an open loop sends: arrival processes as endless streams of send times."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

_BLOCK = 1024


def constant(rate: float) -> Iterator[float]:
    """Seconds after the start of evenly spaced arrivals; an infinite rate sends all at once."""
    return (i / rate for i in count())


def gamma(rate: float, burstiness: float, seed: Sequence[int]) -> Iterator[float]:
    """Seconds after the start of arrivals whose gaps are Gamma(burstiness, 1 / (rate burstiness)).

    The mean gap is 1 / rate and its variance 1 / (rate^2 burstiness): 1 is a Poisson process, less
    is burstier, more is steadier. The parameter is that of vLLM's `--burstiness`.
    """
    if math.isinf(rate):
        yield from constant(rate)
    rng, at = np.random.default_rng(seed), 0.0
    while True:
        for gap in rng.gamma(burstiness, 1 / (rate * burstiness), _BLOCK):
            at += float(gap)
            yield at


def recorded(timestamps: Sequence[float], rate: float | None) -> Iterator[float]:
    """A trace's own arrivals, from its first; stretched to a mean rate if one is given.

    `timestamps` are seconds, ascending, at least one.
    """
    span = timestamps[-1] - timestamps[0]
    scale = 1.0
    if rate is not None and span > 0:
        scale = (len(timestamps) - 1) / (rate * span)
    return ((t - timestamps[0]) * scale for t in timestamps)
