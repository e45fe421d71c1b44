"""Distributions of prompt and answer lengths, written as one word each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MAX_TOKENS = 1 << 20
_SYNTAX = "write 128, uniform:LOW,HIGH or lognormal:MEDIAN,SIGMA,MAX"


@dataclass(frozen=True, slots=True)
class Uniform:
    """Integers low..high, both included; a fixed length has low == high."""

    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        """One length. A fixed one takes a draw too, so that later draws stay where they are."""
        return int(rng.integers(self.low, self.high + 1))


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp(N(ln median, sigma^2)), rounded and clipped to 1..high."""

    median: float
    sigma: float
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        """One length."""
        value = self.median * math.exp(self.sigma * rng.standard_normal())
        return int(min(max(round(value), 1), self.high))


Lengths = Uniform | LogNormal


def parse(text: str) -> Lengths:
    """Reads `128`, `uniform:64,256` or `lognormal:200,0.8,4096`. Raises ValueError."""
    kind, colon, arguments = text.partition(":")
    try:
        if not colon:
            lengths: Lengths = Uniform(int(text), int(text))
        elif kind == "uniform":
            low, high = map(int, arguments.split(","))
            lengths = Uniform(low, high)
        elif kind == "lognormal":
            median, sigma, most = arguments.split(",")
            lengths = LogNormal(float(median), float(sigma), int(most))
        else:
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is no length: {_SYNTAX}") from None
    _check(lengths, text)
    return lengths


def _check(lengths: Lengths, text: str) -> None:
    if not 1 <= lengths.high <= MAX_TOKENS:
        raise ValueError(f"{text!r}: lengths must lie in 1..{MAX_TOKENS}")
    if isinstance(lengths, Uniform):
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"{text!r}: LOW must lie in 1..HIGH")
    elif not 1 <= lengths.median <= lengths.high or not 0 <= lengths.sigma <= 10:
        raise ValueError(f"{text!r}: MEDIAN must lie in 1..MAX and SIGMA in 0..10")
