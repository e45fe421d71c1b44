"""Arrival processes have the mean and the variance they promise."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest

from chiasm.bench import arrivals

NUM = 40_000
RELATIVE = 0.05
"""More than four standard errors of every statistic below."""


@pytest.mark.parametrize(("rate", "burstiness"), [(2.0, 1.0), (50.0, 0.5), (7.0, 4.0)])
def test_moments_of_gamma_gaps(rate: float, burstiness: float) -> None:
    times = np.fromiter(islice(arrivals.gamma(rate, burstiness, (1, 2)), NUM), float)
    gaps = np.diff(times, prepend=0.0)
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(1 / rate, rel=RELATIVE)
    assert gaps.var() == pytest.approx(1 / (rate**2 * burstiness), rel=2 * RELATIVE)


def test_poisson_counts_have_variance_equal_to_their_mean() -> None:
    times = np.fromiter(islice(arrivals.gamma(10.0, 1.0, (3,)), NUM), float)
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.15)


def test_constant_and_infinite_rates() -> None:
    assert list(islice(arrivals.constant(4.0), 4)) == [0.0, 0.25, 0.5, 0.75]
    assert list(islice(arrivals.gamma(math.inf, 1.0, (0,)), 3)) == [0.0, 0.0, 0.0]


def test_seed_decides() -> None:
    first, again, other = (
        list(islice(arrivals.gamma(5.0, 1.0, seed), 20)) for seed in ((1, 0), (1, 0), (1, 1))
    )
    assert first == again != other


def test_recorded_times_keep_their_shape() -> None:
    times = [10.0, 10.5, 12.0, 12.25]
    assert list(arrivals.recorded(times, None)) == [0.0, 0.5, 2.0, 2.25]
    stretched = list(arrivals.recorded(times, 4.0))
    assert stretched[-1] == pytest.approx(3 / 4)
    assert np.diff(stretched) / np.diff(times) == pytest.approx([1 / 3] * 3)
