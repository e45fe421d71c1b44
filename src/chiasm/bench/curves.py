"""Curves of a run for plots, small however long the run was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from chiasm.bench.records import Record

NUM_QUANTILES = 501
NUM_BINS = 120

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """cdf_ms: metric -> value at NUM_QUANTILES even steps from 0 to 1, of the good requests.

    bin_s, tokens_per_s, in_flight: the timeline, [NUM_BINS] each: middle of the bin, tokens that
    came in it, and requests on their way at its middle.
    """

    cdf_ms: Mapping[str, Floats]
    bin_s: Floats
    tokens_per_s: Floats
    in_flight: Floats


def curves(records: Sequence[Record]) -> Curves:
    """The curves of a run's records."""
    good = [r for r in records if not r.error]
    samples = {
        "ttft": np.fromiter((r.ttft_s for r in good if r.ttft_s is not None), np.float64),
        "itl": np.fromiter(chain.from_iterable(r.gaps_s for r in good), np.float64),
        "e2e": np.fromiter((r.e2e_s for r in good), np.float64),
    }
    steps = np.linspace(0, 1, NUM_QUANTILES)
    end = max((r.intended_s + r.e2e_s for r in records), default=0.0)
    edges = np.linspace(0, max(end, 1e-9), NUM_BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    return Curves(
        cdf_ms={k: np.quantile(v, steps) * 1e3 for k, v in samples.items() if v.size},
        bin_s=middles,
        tokens_per_s=_tokens(records, edges) / (edges[1] - edges[0]),
        in_flight=_in_flight(records, middles),
    )


def _tokens(records: Sequence[Record], edges: Floats) -> Floats:
    """Tokens by bin; those of an answer are spread evenly over its chunks."""
    total = np.zeros(NUM_BINS)
    for record in records:
        if record.ttft_s is None:
            continue
        times = np.cumsum([record.intended_s + record.ttft_s, *record.gaps_s])
        bins = np.minimum(np.searchsorted(edges, times, side="right") - 1, NUM_BINS - 1)
        np.add.at(total, bins, record.output_tokens / times.size)
    return total


def _in_flight(records: Sequence[Record], at: Floats) -> Floats:
    begins = np.sort([r.intended_s + r.lag_s for r in records])
    ends = np.sort([r.intended_s + r.e2e_s for r in records])
    num = np.searchsorted(begins, at, side="right") - np.searchsorted(ends, at, side="right")
    return num.astype(np.float64)
